"""Shards behind a URL, in a real S3 server on this machine."""

import json
import os
import socket

import boto3
import pytest
import requests
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from minim_pipeline.cli import main
from minim_pipeline.generate import draw


@pytest.fixture(scope="module")
def s3():
    """A client of a server with a bucket `sets`; the environment tells all other clients of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    url = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "owner",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="sets")
        yield client
    server.stop()


def names(s3, prefix):
    return {entry["Key"] for entry in s3.list_objects_v2(Bucket="sets", Prefix=prefix).get("Contents", [])}


def body(s3, key):
    return s3.get_object(Bucket="sets", Key=key)["Body"].read()


def run(pipeline_dir, out, *options):
    given = ["--model", pipeline_dir, "--device", "cpu", "--modality", "OCT", "--prompt", "edema", "--num-images", 4]
    given += ["--shard-size", 2, "--quiet", "--output-dir", out, *options]
    return main(["generate", *map(str, given)])


@pytest.mark.parametrize("format", ["png", "parquet"])
def test_a_bucket_holds_what_a_folder_would_and_is_gone_on_with(pipeline_dir, tmp_path, s3, monkeypatch, format):
    assert run(pipeline_dir, tmp_path / "out", "--format", format) == 0
    there = f"s3://sets/{format}"
    assert run(pipeline_dir, there, "--format", format, "--shard", "1/2") == 0
    drawn, original = [], draw.draw

    def noted(pipe, batch, *args, **options):
        drawn.extend(item.index for item in batch)
        return original(pipe, batch, *args, **options)

    monkeypatch.setattr(draw, "draw", noted)
    assert run(pipeline_dir, there, "--format", format) == 0
    assert drawn == [0, 1], "the other shard was there"
    local = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names(s3, format) == {f"{format}/{name}" for name in local}
    assert all(body(s3, f"{format}/{name}") == path.read_bytes() for name, path in local.items())

    # A folder of images is whole when its table is there.
    if format == "png":
        s3.delete_object(Bucket="sets", Key="png/data/train-00001-of-00002/metadata.csv")
        assert run(pipeline_dir, there, "--format", format) == 0
        assert drawn == [0, 1, 2, 3] and names(s3, format) == {f"{format}/{name}" for name in local}


def test_a_plan_may_lie_in_a_bucket(pipeline_dir, s3, tmp_path):
    prompt = ["--modality", "OCT", "--prompt", "edema", "--output", "s3://sets/plans/a.parquet"]
    assert main(["plan", "--model", str(pipeline_dir), *prompt]) == 0
    given = [
        "--plan",
        "s3://sets/plans/a.parquet",
        "--output-dir",
        str(tmp_path / "out"),
        "--quiet",
        "--device",
        "cpu",
    ]
    assert main(["generate", "--model", str(pipeline_dir), *given, "--format", "webdataset"]) == 0
    assert (tmp_path / "out/plan.parquet").exists()


@pytest.fixture
def read_only(s3, monkeypatch):
    """From here on the server asks who somebody is, and this process is one who may only read."""
    iam = boto3.client("iam")
    iam.create_user(UserName="reader")
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    allowed = {"Effect": "Allow", "Action": ["s3:Get*", "s3:List*"], "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
    iam.put_user_policy(UserName="reader", PolicyName="reading", PolicyDocument=policy)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    S3FileSystem.clear_instance_cache()
    requests.post(f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth", data=b"0")
    yield
    requests.post(f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth", data=b"inf")
    S3FileSystem.clear_instance_cache()


def check_refused(pipeline_dir, capsys, url, reason):
    assert run(pipeline_dir, url) == 2
    said = capsys.readouterr().err
    assert f"{url}/run.json cannot be read or written: {reason}" in said and said.count("\n") == 1


def test_a_bucket_that_is_not_there_is_told_before_anything_is_drawn(pipeline_dir, s3, capsys, monkeypatch):
    monkeypatch.setattr(draw, "draw", lambda *args, **options: pytest.fail("drawn"))
    check_refused(pipeline_dir, capsys, "s3://no-such-bucket/x", "The specified bucket does not exist")


def test_a_bucket_that_is_read_only_is_told_before_anything_is_drawn(pipeline_dir, read_only, capsys, monkeypatch):
    monkeypatch.setattr(draw, "draw", lambda *args, **options: pytest.fail("drawn"))
    check_refused(pipeline_dir, capsys, "s3://sets/x", "Access Denied")
