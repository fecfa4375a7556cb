"""How the night speaks with replicas: the token that `/reload` asks for, and the request itself."""

import os
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit


def token() -> str:
    """The secret in the file that SERVE_TOKEN_FILE names, or else in SERVE_TOKEN; empty if there is neither."""
    path = os.environ.get("SERVE_TOKEN_FILE")
    return (Path(path).read_text() if path else os.environ.get("SERVE_TOKEN", "")).strip()


def tell(url: str) -> bool:
    """Have a replica reload; returns whether it did."""
    where = urlsplit(url)
    connection = HTTPConnection(str(where.hostname), where.port, timeout=120)
    try:
        connection.request("POST", "/reload", headers={"Authorization": f"Bearer {token()}"})
        response = connection.getresponse()
        print(f"{url}: {response.read(4096).decode(errors='replace')}")
        return response.status == 200
    except (OSError, HTTPException) as error:
        print(f"{url} does not answer ({error}): it follows the file, or serves the new version when it starts again.")
        return False
    finally:
        connection.close()
