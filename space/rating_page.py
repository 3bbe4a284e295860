"""The rating page: a page of its own and a few addresses, because a rater's keys have to be answered at once.

Gradio's components take a round trip through its queue for every event; here one small request stores a rating, and
the next image is already there.
"""

from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ValidationError
from rating_desk import Answer, Ask, RatingDesk, Shown
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route


PAGES = Path(__file__).parent / "pages"
LONGEST_BODY = 4000  # bytes


def routes(desk: RatingDesk) -> list[Route]:
    """The page's addresses, for the web server."""

    def post(place: str, model: type[Ask], act: Callable) -> Route:
        """An address that does something with what is sent, and answers with what is left for the rater."""

        def answer(asked: Ask) -> JSONResponse:
            try:
                act(asked)
                return JSONResponse(desk.upcoming(asked.rater, asked.modalities))
            except ValueError as error:
                return JSONResponse({"error": str(error)}, 422)

        async def endpoint(request: Request) -> JSONResponse:
            asked, problem = await read_body(request, model)
            return problem or await run_in_threadpool(answer, asked)

        return Route(place, endpoint, methods=["POST"])

    def image(request: Request) -> Response:
        found = desk.images.get(request.path_params["id"])
        if found is None:
            return JSONResponse({"error": "There is no such image."}, 404)
        try:
            picture = desk.read(found)
        except (ValueError, OSError):  # it may be that nobody has looked at it yet; the path is not for visitors
            return JSONResponse({"error": "This image cannot be shown."}, 404)
        headers = {"Cache-Control": "private, max-age=3600"}
        return Response(picture, media_type="image/png", headers=headers)

    return [
        Route("/rate", lambda request: FileResponse(PAGES / "rate.html")),
        Route("/rate/modalities", lambda request: JSONResponse(desk.choices())),
        post("/rate/next", Ask, lambda asked: None),
        post("/rate/rating", Answer, desk.take),
        post("/rate/skip", Shown, desk.skip),
        Route("/rate/image/{id}", image),
    ]


async def read_body(request: Request, model: type[BaseModel]) -> tuple[BaseModel | None, JSONResponse | None]:
    """What was sent, checked; or the answer that says in words what is wrong with it."""
    # Another site's page may send plain text here without asking, but no JSON: no ratings in a visitor's name.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return None, JSONResponse({"error": "Content-Type has to be application/json."}, 415)
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_BODY:
            return None, JSONResponse({"error": f"More than {LONGEST_BODY} bytes were sent."}, 413)
    try:
        return model.model_validate_json(body), None
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors()]
        return None, JSONResponse({"error": "; ".join(problems)}, 422)
