"""/v1/files: what batches read and write."""

from __future__ import annotations

from functools import partial

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from shoal.openai.schema import APIError
from shoal.server.bodies import json_response, owner_of
from shoal.server.routes.queries import page_query
from shoal.server.routes.upload import Form, receive
from shoal.server.store.files import FileStore, Purpose

IDLE = 30.0  # seconds
_MOST_LISTED = 10_000


def routes(files: FileStore, *, idle: float = IDLE) -> list[Route]:
    """``idle``: the seconds after which an upload is given up of which nothing comes."""
    return [
        Route("/v1/files", partial(_create, files, idle), methods=["POST"]),
        Route("/v1/files", partial(_list, files), methods=["GET"]),
        Route("/v1/files/{file_id}", partial(_retrieve, files), methods=["GET"]),
        Route("/v1/files/{file_id}", partial(_delete, files), methods=["DELETE"]),
        Route("/v1/files/{file_id}/content", partial(_content, files), methods=["GET"]),
    ]


async def _create(files: FileStore, idle: float, request: Request) -> Response:
    upload = await run_in_threadpool(files.upload, owner_of(request))
    try:
        form = await receive(request, upload, idle)
        if form.filename is None:
            raise APIError("file: this field is required", "file")
        file = await run_in_threadpool(upload.finish, form.filename, _purpose(form))
    finally:
        upload.close()
    return json_response(file)


def _purpose(form: Form) -> Purpose:
    purpose = form.fields.pop("purpose", None)
    if purpose is None:
        raise APIError("purpose: this field is required", "purpose")
    if purpose != "batch":
        raise APIError(f"purpose: got {purpose!r}, must be 'batch': files are for batches alone", "purpose")
    for name in form.fields:
        if name.startswith("expires_after"):
            raise APIError("expires_after: not supported: files stay until they are deleted", "expires_after")
        raise APIError(f"{name}: no such field; a file comes with its purpose", name)
    return "batch"


async def _list(files: FileStore, request: Request) -> Response:
    query = page_query(request, _MOST_LISTED, _MOST_LISTED, others=["purpose"])
    return json_response(files.page(owner_of(request), query, request.query_params.get("purpose")))


async def _retrieve(files: FileStore, request: Request) -> Response:
    return json_response(files.get(owner_of(request), request.path_params["file_id"]))


async def _delete(files: FileStore, request: Request) -> Response:
    file_id = request.path_params["file_id"]
    await run_in_threadpool(files.delete, owner_of(request), file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})


async def _content(files: FileStore, request: Request) -> Response:
    owner, file_id = owner_of(request), request.path_params["file_id"]
    return FileResponse(
        files.path(owner, file_id),
        media_type="application/octet-stream",
        filename=files.get(owner, file_id).filename,
    )
