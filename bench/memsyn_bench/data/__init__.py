"""Data packs and loaders: pictures, labels and licences."""
