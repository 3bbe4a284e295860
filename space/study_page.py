"""The pages of studies: a reader's, behind a token of its own, and the host's, behind the host's token."""

import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, quote

from jinja2 import Environment, FileSystemLoader
from rating_desk import RatingDesk
from rating_page import PAGES, desk_routes, refused
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from studies import Studies, Study
from study_plan import MOST_IMAGES, MOST_READERS, ORDERS, QUESTIONS, Plan

from minim_pipeline import resolve_modality
from minim_pipeline.evaluation.reader_study import study_results


LONGEST_FORM = 20_000  # bytes
# A token stands in the address: it goes to no other site, and into no cache.
PRIVATE = {"Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


def reader_routes(studies: Studies) -> list[Route]:
    """What a reader's link leads to, for the web server; a token opens its own reader's images and answers only."""

    def door(request: Request) -> tuple[RatingDesk, str | None] | None:
        found = studies.readers.get(request.path_params["token"])
        return found and (found[0].desk, found[1])

    def page(request: Request) -> Response:
        if request.query_params.get("token") not in studies.readers:
            return HTMLResponse("This link is not known. Ask whoever sent it for another.", 403)
        return FileResponse(PAGES / "rate.html", headers=PRIVATE)

    def about(request: Request) -> Response:
        found = studies.readers.get(request.path_params["token"])
        if found is None:
            return refused()
        study, rater = found
        asked = QUESTIONS[study.plan.question]
        told = {"title": study.plan.title, "question": asked.words, "answers": asked.answers, "rater": rater}
        return JSONResponse(told, headers=PRIVATE)

    prefix = "/study/{token}"
    return [Route("/study", page), Route(prefix + "/about", about), *desk_routes(prefix, door)]


def plan_of(form: dict[str, str]) -> Plan:
    """The plan of a form that was filled in; ValueError says what is wrong with it."""

    def number(name: str, kind: Callable = float):
        try:
            return kind(form.get(name, ""))
        except ValueError:
            raise ValueError(f"{name} has to be a number, got {form.get(name, '')[:40]!r}.") from None

    raters = tuple(name.strip() for name in form.get("raters", "").splitlines() if name.strip())
    shares = {name: number(name) for name in ("overlap", "repeat_share", "real_share")}
    words = {name: form.get(name, "").strip() for name in ("title", "question", "images", "real", "order")}
    return Plan(**words, **shares, raters=raters, each=number("each", int))


def progress(study: Study) -> list[dict]:
    """By reader: `name`, how many images are `done` of `total`, and the `token`."""
    done = dict.fromkeys(study.tokens, 0)
    for answer in study.answers():
        done[answer.rater] += 1
    return [
        {"name": name, "done": done[name], "total": len(study.shown[name]), "token": token}
        for name, token in study.tokens.items()
    ]


def ratings_csv(study: Study, studies: Studies) -> bytes:
    """The answers as `RatingStore.write_csv` has them, with paths as seen from the folder of studies."""
    with tempfile.NamedTemporaryFile(dir=studies.folder, suffix=".csv") as file:
        study.store.write_csv(file.name, studies.folders(study.plan, study.id))
        return Path(file.name).read_bytes()


def host_routes(studies: Studies, host_token: str) -> list[Route]:
    """The host's pages, for the web server: to make studies, send links, and see progress and results."""
    environment = Environment(loader=FileSystemLoader(PAGES), autoescape=True)
    choices = {
        "questions": [(name, asked.words) for name, asked in QUESTIONS.items()],
        "orders": [*ORDERS.items()],
        "most": {"each": MOST_IMAGES, "raters": MOST_READERS},
    }

    def render(name: str, status: int = 200, **values) -> HTMLResponse:
        return HTMLResponse(environment.get_template(name).render(token=host_token, **values), status, PRIVATE)

    def listing(status: int = 200, problem: str = "", form: dict | None = None) -> HTMLResponse:
        known = [(study, sum(p["done"] for p in progress(study))) for study in studies.open.values()]
        shown = {
            "studies": known,
            "problem": problem,
            "form": form or {},
            "sources": [(name, name) for name in studies.sources],
            "prompts": [(name, f"to be drawn: {name}") for name in studies.prompts.files],
            "pending": [(plan, identity in studies.failed) for identity, plan in studies.pending.items()],
        }
        return render("studies.html.jinja", status, **shown, **choices)

    def is_host(token: str) -> bool:
        return secrets.compare_digest(token.encode(), host_token.encode())

    def for_host(show: Callable[[Request], Response]) -> Callable[[Request], Response]:
        def guarded(request: Request) -> Response:
            if not is_host(request.query_params.get("token", "")):
                return HTMLResponse("This page is the host's: its link is told where the server was started.", 403)
            return show(request)

        return guarded

    def for_study(show: Callable[[Study], Response]) -> Callable[[Request], Response]:
        def found(request: Request) -> Response:
            study = studies.open.get(request.path_params["id"])
            return show(study) if study else HTMLResponse("There is no such study.", 404)

        return for_host(found)

    def overview(study: Study) -> Response:
        results = study_results(study.answers())
        tables = {"All": results["all"]}
        tables |= {resolve_modality(name).name: figures for name, figures in results["modalities"].items()}
        asked = QUESTIONS[study.plan.question]
        return render("study.html.jinja", study=study, asked=asked, readers=progress(study), tables=tables)

    def csv(study: Study) -> Response:
        try:
            headers = PRIVATE | {"Content-Disposition": f'attachment; filename="study-{study.id}.csv"'}
            return Response(ratings_csv(study, studies), media_type="text/csv", headers=headers)
        except (ValueError, OSError):  # it has paths of this machine
            return HTMLResponse("Images of this study are no longer there, or are others than were rated.", 409)

    async def make(request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LONGEST_FORM:
                return HTMLResponse(f"More than {LONGEST_FORM} bytes were sent.", 413)
        given = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=20)
        form = {name: values[0] for name, values in given.items()}
        if not is_host(form.get("token", "")):
            return HTMLResponse("This page is the host's: its link is told where the server was started.", 403)
        try:
            study = await run_in_threadpool(lambda: studies.make(plan_of(form)))
        except ValueError as error:
            return await run_in_threadpool(listing, 422, str(error), form)
        place = f"studies/{study.id}" if study else "studies"  # its images are being drawn
        return RedirectResponse(f"{place}?token={quote(host_token)}", 303)

    return [
        Route("/studies", for_host(lambda request: listing())),
        Route("/studies", make, methods=["POST"]),
        Route("/studies/{id}", for_study(overview)),
        Route("/studies/{id}/results", for_study(lambda study: JSONResponse(study_results(study.answers())))),
        Route("/studies/{id}/ratings.csv", for_study(csv)),
    ]
