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


# Of a request the desk that it is for, and the rater whose link it is (None: whom it names); None for a foreign link.
Door = Callable[[Request], tuple[RatingDesk, str | None] | None]


def routes(desk: RatingDesk) -> list[Route]:
    """The open page's addresses, for the web server: whoever comes gives a name."""
    return [
        Route("/rate", lambda request: FileResponse(PAGES / "rate.html")),
        *desk_routes("/rate", lambda request: (desk, None)),
    ]


def desk_routes(prefix: str, door: Door) -> list[Route]:
    """What a rating page asks of the server."""

    def post(place: str, model: type[Ask], act: Callable) -> Route:
        """An address that does something with what is sent, and answers with what is left for the rater."""

        def answer(desk: RatingDesk, asked: Ask) -> JSONResponse:
            try:
                act(desk, asked)
                return JSONResponse(desk.upcoming(asked.rater, asked.modalities))
            except ValueError as error:
                return JSONResponse({"error": str(error)}, 422)

        async def endpoint(request: Request) -> JSONResponse:
            found = door(request)
            if found is None:
                return refused()
            asked, problem = await read_body(request, model)
            if asked is None:
                return problem
            desk, rater = found
            return await run_in_threadpool(answer, desk, asked.model_copy(update={"rater": rater or asked.rater}))

        return Route(prefix + place, endpoint, methods=["POST"])

    def image(request: Request) -> Response:
        found = door(request)
        if found is None:
            return refused()
        desk, rater = found
        name = request.path_params["id"]
        asked = desk.images.get(name)
        if asked is None or (rater is not None and (name, 0) not in desk.queue_of(rater).place):
            return JSONResponse({"error": "There is no such image."}, 404)
        try:
            picture = desk.read(asked)
        except (ValueError, OSError):  # it may be that nobody has looked at it yet; the path is not for visitors
            return JSONResponse({"error": "This image cannot be shown."}, 404)
        headers = {"Cache-Control": "private, max-age=3600"}
        return Response(picture, media_type="image/png", headers=headers)

    def modalities(request: Request) -> JSONResponse:
        found = door(request)
        return refused() if found is None else JSONResponse(found[0].choices())

    return [
        Route(prefix + "/modalities", modalities),
        post("/next", Ask, lambda desk, asked: None),
        post("/rating", Answer, RatingDesk.take),
        post("/skip", Shown, RatingDesk.skip),
        Route(prefix + "/image/{id}", image),
    ]


def refused() -> JSONResponse:
    return JSONResponse({"error": "This link is not known. Ask whoever sent it for another."}, 403)


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
