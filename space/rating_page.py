"""The rating page: a page of its own and four addresses, because a rater's keys have to be answered at once.

Gradio's components take a round trip through its queue for every event; here one small request stores a rating, and
the next image is already there.
"""

from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rating_images import RatedImage, queue
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from minim_pipeline import resolve_modality
from minim_pipeline.ratings import LONGEST, Rating, RatingStore


PAGES = Path(__file__).parent / "pages"
AHEAD = 6  # images that a browser is told of before they are needed
LONGEST_BODY = 4000  # bytes


class Ask(BaseModel):
    """Who asks for images to rate."""

    model_config = ConfigDict(str_strip_whitespace=True)
    rater: str = Field(min_length=1, max_length=LONGEST["rater"])


class Answer(Ask):
    """A rating: of which image, at which turn of it, and after how many seconds."""

    image: str = Field(min_length=16, max_length=16)
    turn: int = Field(ge=0, le=99)
    rating: int = Field(ge=1, le=3)
    seconds: float = Field(ge=0, le=86_400)


class RatingDesk:
    """Hands out images, and takes ratings into the store; ValueError if that has ratings of others of the same names.

    Args:
        real_share, repeat_share: see `rating_images.queue`.
        keep: called with each rating stored, before it is acknowledged.
    """

    def __init__(self, store: RatingStore, images: list[RatedImage], real_share=0.1, repeat_share=0.1, keep=None):
        digests = {(image.kind, image.path): image.digest for image in images}
        for rating in store.ratings():
            if rating.digest and digests.get((rating.kind, rating.path), rating.digest) != rating.digest:
                another = "choose another --store (and --ratings_repo)"
                raise ValueError(f"{store.path} holds ratings of another {rating.path}: {another}.")
        self.store, self.images = store, {image.id: image for image in images}
        self.real_share, self.repeat_share, self.keep = real_share, repeat_share, keep
        self.queues: dict[str, list[tuple[RatedImage, int]]] = {}
        self.read = lru_cache(maxsize=256)(RatedImage.read)

    def queue_of(self, rater: str) -> list[tuple[RatedImage, int]]:
        if rater not in self.queues:
            if len(self.queues) >= 1000:  # names are anybody's to invent
                self.queues.clear()
            self.queues[rater] = queue(list(self.images.values()), rater, self.real_share, self.repeat_share)
        return self.queues[rater]

    def upcoming(self, rater: str) -> dict:
        """What is left for a rater: the `next` images, how many are `done` of `total`, and the `last` ones rated."""
        shown = self.queue_of(rater)
        rated = {(r.path, r.kind, r.turn): r.rating for r in self.store.ratings(rater)}
        keys = [(image.path, image.kind, turn) for image, turn in shown]
        left = [i for i, key in enumerate(keys) if key not in rated]
        done = [i for i, key in enumerate(keys) if key in rated]

        def tell(i: int) -> dict:
            image, turn = shown[i]
            about = {"image": image.id, "text": image.text, "modality": resolve_modality(image.modality).name}
            return about | {"turn": turn, "rating": rated.get(keys[i])}

        told = {"next": [tell(i) for i in left[:AHEAD]], "last": [tell(i) for i in done[-20:]]}
        return told | {"done": len(done), "total": len(shown)}

    def take(self, answer: Answer) -> None:
        """Stores a rating; ValueError if there is no such image, or it is not this rater's."""
        image = self.images.get(answer.image)
        if image is None or (image, answer.turn) not in self.queue_of(answer.rater):
            raise ValueError("This image is not among those to rate: reload the page.")
        shown = {name: getattr(image, name) for name in ("path", "text", "modality", "kind", "digest")}
        said = {"rating": answer.rating, "turn": answer.turn, "seconds": round(answer.seconds, 3)}
        rating = Rating(rater=answer.rater, **shown, **said)
        self.store.add(rating)
        if self.keep is not None:
            self.keep(rating)

    def routes(self) -> list[Route]:
        """The page's addresses, for the web server."""

        async def next_images(request: Request) -> JSONResponse:
            ask, problem = await read_body(request, Ask)
            return problem or JSONResponse(await run_in_threadpool(self.upcoming, ask.rater))

        async def rating(request: Request) -> JSONResponse:
            answer, problem = await read_body(request, Answer)
            if problem:
                return problem
            try:
                await run_in_threadpool(self.take, answer)
            except ValueError as error:
                return JSONResponse({"error": str(error)}, 422)
            return JSONResponse(await run_in_threadpool(self.upcoming, answer.rater))

        def image(request: Request) -> Response:
            found = self.images.get(request.path_params["id"])
            if found is None:
                return JSONResponse({"error": "There is no such image."}, 404)
            headers = {"Cache-Control": "private, max-age=3600"}
            return Response(self.read(found), media_type="image/png", headers=headers)

        return [
            Route("/rate", lambda request: FileResponse(PAGES / "rate.html")),
            Route("/rate/next", next_images, methods=["POST"]),
            Route("/rate/rating", rating, methods=["POST"]),
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
