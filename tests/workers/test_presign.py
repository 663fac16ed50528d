"""Signature Version 4 in the query string, held against Amazon's published example and against a real store."""

from __future__ import annotations

from datetime import UTC, datetime

from workers.presign import Signer


def test_the_published_example_is_signed_as_published() -> None:
    # "Authenticating Requests: Using Query Parameters (AWS Signature Version 4)", Amazon S3 API reference.
    signer = Signer("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "us-east-1")
    now = datetime(2013, 5, 24, tzinfo=UTC)
    url = signer.presign("GET", "https://examplebucket.s3.amazonaws.com/test.txt", {}, now, 86400)
    assert url == (
        "https://examplebucket.s3.amazonaws.com/test.txt?X-Amz-Algorithm=AWS4-HMAC-SHA256"
        "&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1%2Fs3%2Faws4_request"
        "&X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host"
        "&X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
    )


def test_every_signed_header_is_named_and_changes_the_signature() -> None:
    signer = Signer("key", "secret", "us-east-1")
    now = datetime(2026, 1, 1, tzinfo=UTC)
    urls = {
        size: signer.presign("PUT", "http://127.0.0.1:1/b/o?uploadId=u&partNumber=1", {"Content-Length": size}, now, 60)
        for size in ("1", "2")
    }
    assert all("X-Amz-SignedHeaders=content-length%3Bhost" in url for url in urls.values())
    assert all("partNumber=1" in url and "uploadId=u" in url for url in urls.values())
    assert urls["1"] != urls["2"]
