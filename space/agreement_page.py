"""The page that tells how far raters agree, with each other and with themselves, and what has been rated."""

from collections import Counter
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from starlette.responses import HTMLResponse
from starlette.routing import Route

from minim_pipeline import MODALITIES
from minim_pipeline.evaluation.agreement import rater_agreement
from minim_pipeline.ratings import CANNOT_JUDGE, Rating, RatingStore, consistency, counts


def summary(answers: list[Rating], show_names: bool) -> dict:
    """What the page shows; raters are numbered in the order in which they began, unless the host shows names."""
    ratings = [answer for answer in answers if answer.rating != CANNOT_JUDGE]
    unjudged = Counter(answer.rater for answer in answers if answer.rating == CANNOT_JUDGE)
    names = list(dict.fromkeys(answer.rater for answer in answers))
    called = {name: name if show_names else f"Rater {i}" for i, name in enumerate(names, 1)}
    again, raters = consistency(ratings), []
    for name in names:
        own = [rating for rating in ratings if rating.rater == name]
        given = {kind: [rating.rating for rating in own if rating.kind == kind] for kind in ("generated", "real")}
        means = {kind: sum(values) / len(values) if values else None for kind, values in given.items()}
        told = {"name": called[name], "n": len(own), "means": means, "unjudged": unjudged[name]}
        raters.append(told | {"again": again.get(name, {"n": 0, "same": None})})
    # Of an image shown twice the first rating counts; real and generated images may have one path.
    shown_first = [rating for rating in ratings if rating.turn == 0]
    first = [{"path": f"{r.kind}/{r.path}", "rater": r.rater, "rating": r.rating} for r in shown_first]
    agreement = rater_agreement(first)
    for pair in agreement["pairs"]:
        pair["raters"] = [called[name] for name in sorted(pair["raters"], key=names.index)]
    table = {MODALITIES[name].name: row for name, row in counts(ratings).items()}
    return {"n": len(ratings), "raters": raters, "agreement": agreement, "counts": table}


def routes(store: RatingStore, show_names: bool = False) -> list[Route]:
    """The page's address, for the web server."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "pages"), autoescape=True)
    template = environment.get_template("agreement.html.jinja")

    def page(request) -> HTMLResponse:
        return HTMLResponse(template.render(summary(store.answers(), show_names)))

    return [Route("/agreement", page)]
