"""Large files: the LFS batch and verify calls of the Hub, and the storage behind its signed addresses."""

from __future__ import annotations

import hashlib
import re
import uuid
from urllib.parse import quote
from xml.sax.saxutils import escape

from .content import file_response
from .messages import HttpError, Request, Response
from .routing import REPOSITORY, Site, route
from .store import Repository, Upload

LFS_TYPE = {"Content-Type": "application/vnd.git-lfs+json"}


def _actions(site: Site, request: Request, repository: Repository, oid: str, size: int) -> dict[str, object]:
    """Say where the bytes of an object go: to one address, or part by part."""
    key, chunk = uuid.uuid4().hex, site.settings.chunk_bytes

    def address(method: str, path: str) -> str:
        return request.storage + site.signer.sign(method, path)

    verify = {
        "href": f"{request.endpoint}/{quote(repository.name)}.git/info/lfs/objects/verify",
        "header": {},
    }
    if size <= chunk:
        site.uploads[key] = Upload(repository, oid, size, size)
        return {"upload": {"href": address("PUT", f"/uploads/{key}"), "header": {}}, "verify": verify}
    site.uploads[key] = upload = Upload(repository, oid, size, chunk)
    header = {str(n): address("PUT", f"/uploads/{key}/{n}") for n in range(1, upload.part_count + 1)}
    complete = {"href": address("POST", f"/uploads/{key}"), "header": {"chunk_size": str(chunk), **header}}
    return {"upload": complete, "verify": verify}


@route("POST", f"/{REPOSITORY}\\.git/info/lfs/objects/batch")
def batch(site: Site, request: Request, name: str) -> Response:
    asked = request.json()
    # Without a ref it may be for a pull request, which readers may open too.
    repository = site.repository(request, name, write="ref" in asked)
    if request.account is None:
        raise HttpError(401, "Invalid username or password.")
    if asked.get("operation") != "upload" or asked.get("hash_algo", "sha256") != "sha256":
        raise HttpError(422, "only uploads under SHA-256 are served")
    objects: list[dict[str, object]] = []
    for item in asked["objects"]:
        oid, size = item["oid"], item["size"]
        told: dict[str, object] = {"oid": oid, "size": size}
        if not re.fullmatch("[0-9a-f]{64}", oid) or size <= 0:
            told["error"] = {"code": 422, "message": "not an object of SHA-256 and a size above 0"}
        elif repository.objects.get(oid) != size:
            told |= {"authenticated": True, "actions": _actions(site, request, repository, oid, size)}
        objects.append(told)
    large = any(item["size"] > site.settings.chunk_bytes for item in asked["objects"])
    transfer = "multipart" if large and "multipart" in asked.get("transfers", []) else "basic"
    return Response.of({"transfer": transfer, "objects": objects}, headers=LFS_TYPE)


@route("POST", f"/{REPOSITORY}\\.git/info/lfs/objects/verify")
def verify(site: Site, request: Request, name: str) -> Response:
    asked = request.json()
    repository = site.repository(request, name)
    if request.account is None:
        raise HttpError(401, "Invalid username or password.")
    if repository.objects.get(asked.get("oid", "")) != asked.get("size"):
        raise HttpError(404, f"Object does not exist: {asked.get('oid')}")
    return Response.of({})


class StorageError(HttpError):
    """A refusal of the storage, which answers in XML."""

    def response(self) -> Response:
        text = f"<Error><Code>{self.code}</Code><Message>{escape(self.message)}</Message></Error>"
        return Response(self.status, {"Content-Type": "application/xml"}, text.encode())


def check_signature(site: Site, request: Request) -> None:
    """Let only signed requests in; a token has no business here and is refused."""
    if request.headers.get("Authorization"):
        raise StorageError(400, "Only one auth mechanism allowed", code="InvalidArgument")
    method = "GET" if request.method == "HEAD" else request.method
    if not site.signer.holds(method, request.path, request.query):
        raise StorageError(403, "The signature does not fit, or is too old", code="SignatureDoesNotMatch")


def _upload(site: Site, key: str) -> Upload:
    if key not in site.uploads:
        raise StorageError(404, "The specified upload does not exist", code="NoSuchUpload")
    return site.uploads[key]


@route("PUT", r"/uploads/(?P<key>[0-9a-f]{32})(/(?P<number>\d+))?")
def put_part(site: Site, request: Request, key: str, number: str) -> Response:
    upload, part = _upload(site, key), int(number or 1)
    path, digest = site.store.part_path(key, part), hashlib.md5(usedforsecurity=False)
    arriving = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with arriving.open("wb") as file:
            for piece in request.body.chunks():
                digest.update(piece)
                file.write(piece)
        size = arriving.stat().st_size
        last = upload.size - upload.part_bytes * (upload.part_count - 1)
        expected = last if part == upload.part_count else upload.part_bytes
        if part > upload.part_count or size != expected:
            raise StorageError(
                400, f"part {part} has {size} bytes, expected {expected}", code="EntityTooSmall"
            )
        arriving.replace(path)
    finally:
        arriving.unlink(missing_ok=True)
    upload.parts[part] = f'"{digest.hexdigest()}"'
    if not number and (
        problem := site.store.keep_object(upload.repository, upload.sha256, upload.size, [path])
    ):
        raise StorageError(400, problem, code="BadDigest")
    return Response(headers={"ETag": upload.parts[part]})


@route("POST", r"/uploads/(?P<key>[0-9a-f]{32})")
def complete(site: Site, request: Request, key: str) -> Response:
    upload, asked = _upload(site, key), request.json()
    if upload.repository.objects.get(upload.sha256) == upload.size:
        return Response.of({})  # The answer to an earlier call was lost.
    told = {part["partNumber"]: part["etag"] for part in asked.get("parts", [])}
    if asked.get("oid") != upload.sha256 or told != upload.parts or len(told) != upload.part_count:
        raise StorageError(400, "parts are missing, or are not the ones that arrived", code="InvalidPart")
    paths = [site.store.part_path(key, part) for part in sorted(upload.parts)]
    if problem := site.store.keep_object(upload.repository, upload.sha256, upload.size, paths):
        raise StorageError(400, problem, code="BadDigest")
    return Response.of({})


@route("GET", "/objects/(?P<sha256>[0-9a-f]{64})")
@route("HEAD", "/objects/(?P<sha256>[0-9a-f]{64})")
def get_object(site: Site, request: Request, sha256: str) -> Response:
    file = site.store.object_path(sha256)
    if not file.is_file():
        raise StorageError(404, "The specified key does not exist", code="NoSuchKey")
    return file_response(site, request, sha256, file.stat().st_size, {"ETag": f'"{sha256}"'})
