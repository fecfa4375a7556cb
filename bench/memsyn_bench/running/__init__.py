"""Runs methods through sequences, keeps records, resumes."""
