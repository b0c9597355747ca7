"""An S3 store as tests start it: moto's server in a process of its own, which checks keys and signatures."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import boto3

BUCKET = "tessera"


class Store:
    """A bucket and a user with a key, which `environment` has."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.folder = folder
        self.log = (folder / "store.log").open("w")
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", self.url.rpartition(":")[2]]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        self.environment = {
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(folder / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
            "DVC_SITE_CACHE_DIR": str(folder / "site"),  # what DVC remembers of clones and stores
            "NO_PROXY": "127.0.0.1",
        }

    def open(self) -> None:
        """Wait for the store, make the bucket and a user; from then on it asks for the user's key."""
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/moto-api/", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert self.process.poll() is None and time.monotonic() < end, (self.folder / "store.log").read_text()
                time.sleep(0.2)
        root = {"aws_access_key_id": "root", "aws_secret_access_key": "root", "region_name": "us-east-1"}
        users = boto3.client("iam", endpoint_url=self.url, **root)
        users.create_user(UserName="team")
        allowed = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
        users.put_user_policy(UserName="team", PolicyName="store", PolicyDocument=policy)
        key = users.create_access_key(UserName="team")["AccessKey"]
        self.secret = key["SecretAccessKey"]
        self.environment |= {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": self.secret}
        keys = {"aws_access_key_id": key["AccessKeyId"], "aws_secret_access_key": self.secret}
        self.store = boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", **keys)
        self.store.create_bucket(Bucket=BUCKET)
        headers = {"content-type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/moto-api/reset-auth", b"0", headers)).close()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()
