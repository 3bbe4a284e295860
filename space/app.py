"""The Space: generate images, rate them, and see how far raters agree. Runs on one's own machine, and on Hugging Face.

    pip install -r space/requirements.txt
    python space/app.py

What the host decides is given on the command line or, as on Spaces, by variables of the same name (`MINIM_STORE` for
`--store`). Visitors choose neither model nor file.
"""

import argparse
import os
import secrets
import sys
from pathlib import Path
from threading import Thread


# Before Gradio is imported: it would look for a newer version, and count its users.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

try:
    import spaces  # ZeroGPU's wants to come before torch
except ImportError:
    spaces = None

import gradio as gr
from about_page import build as build_about
from agreement_page import routes as agreement_routes
from doors import doors
from drawing import Drawer
from generate_page import build as build_generate
from generate_settings import Limits
from huggingface_hub.utils import httpx
from rating_desk import RatingDesk
from rating_images import AT_ONCE, read_folder
from rating_log import RatingLog
from rating_page import PAGES
from rating_page import routes as rating_routes
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from studies import Studies
from study_drawing import Prompts
from study_page import host_routes, reader_routes

from minim_pipeline import EMBEDDED_CHECKPOINT, __version__
from minim_pipeline.loading import load_pipeline, model_identity, register_modalities
from minim_pipeline.options import ReadingOptions, add_options, options_from
from minim_pipeline.ratings import RatingStore


HERE = Path(__file__).resolve().parent
NAVIGATION = """<nav class="minim-pages" aria-label="Pages">
<a href="./"{}>Generate</a> <a href="rate">Rate</a> <a href="agreement">Agreement</a> <a href="about"{}>About</a>
</nav>"""


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, default, kind=str, **options):
        value = os.environ.get("MINIM_" + name.upper())
        parser.add_argument("--" + name, default=default if value is None else kind(value), type=kind, **options)

    add("model", str(EMBEDDED_CHECKPOINT), help="Folder or Hub id of a pipeline.")
    add("images", str(HERE / "images"), help="Folder of generated images to rate, with data.csv.")
    add("real", None, help="Folder of real images to mix in, with data.csv.")
    add("real_share", 0.1, float, help="Of the images to rate, how many are real, in [0, 1).")
    add("repeat_share", 0.1, float, help="How many of the images to rate come a second time, in [0, 1].")
    add_options(parser, ReadingOptions)
    try:
        parser.set_defaults(fit=os.environ.get("MINIM_FIT", "pad"))
        parser.set_defaults(window=[*map(float, os.environ.get("MINIM_WINDOW", "").split())] or None)
    except ValueError:
        parser.error(f"MINIM_WINDOW has to be two numbers, LOW HIGH, got {os.environ['MINIM_WINDOW']!r}")
    add("store", "ratings/ratings.sqlite", help="Where ratings go.")
    add("ratings_repo", None, help="Dataset repository on the Hub that ratings are pushed to; needs HF_TOKEN.")
    add("show_names", 0, int, help="1: the page on agreement shows raters' names.")
    add("studies", "ratings/studies", help="Folder of the studies.")
    add(
        "study_images",
        None,
        help="Folder of what the host may choose for studies: folders with data.csv, CSVs of prompts.",
    )
    add("host_token", None, help="Opens the pages of studies; a new one with each start, if left out.")
    add("password", None, help="Opens the other pages, too, if given.")
    add("max_requests", 3000, int, help="Requests a minute from one address.")
    add("max_images", 8, int, help="The most images of one call.")
    add("max_queue", 16, int, help="Calls that may wait.")
    add("host", "127.0.0.1" if "SPACE_ID" not in os.environ else "0.0.0.0", help="Address to listen on.")
    add("port", int(os.environ.get("GRADIO_SERVER_PORT", 7860)), int)
    args = parser.parse_args(argv)
    if not 0 <= args.real_share < 1 or not 0 <= args.repeat_share <= 1:
        parser.error(f"shares have to be in [0, 1) and [0, 1], got {args.real_share} and {args.repeat_share}")
    for name in ("max_queue", "max_requests"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 1, got {getattr(args, name)}")
    if args.ratings_repo and not os.environ.get("HF_TOKEN"):
        parser.error("--ratings_repo needs a token with the right to write to it, in the variable HF_TOKEN")
    args.host_token = args.host_token or secrets.token_urlsafe(16)
    for name in ("host_token", "password"):
        given = getattr(args, name)
        if given is not None and len(given) < 12:
            parser.error(f"--{name} has to have at least 12 characters, got {len(given)}")
    return args


def study_sources(args: argparse.Namespace) -> dict[str, Path]:
    """By the names that a host sees, the folders of images for studies: the rating page's, and those of one folder."""
    named = {"images": args.images, "real": args.real}
    sources = {name: Path(folder) for name, folder in named.items() if folder}
    if args.study_images and not Path(args.study_images).is_dir():
        raise ValueError(f"--study_images: {args.study_images} is no folder.")
    found = sorted(Path(args.study_images).glob("*/data.csv")) if args.study_images else []
    return sources | {f"{csv.parent.name}/": csv.parent for csv in found}


def build(args: argparse.Namespace) -> tuple[gr.Blocks, list]:
    """The pages, and the addresses beside them; the model is loaded, and everything that is named is read."""
    register_modalities(args.model)  # before any row: it may be of a modality that only the model knows
    reading = options_from(ReadingOptions, args).reading_elsewhere()
    folders = {"generated": args.images} | ({"real": args.real} if args.real else {})
    by_kind = {kind: read_folder(folder, kind, reading) for kind, folder in folders.items()}
    images = [image for kind in by_kind for image in by_kind[kind]]
    store = RatingStore(args.store)
    keep = None
    if args.ratings_repo:
        folder = Path(args.store).absolute().parent / "log"
        keep = RatingLog(store, folder, args.ratings_repo, os.environ["HF_TOKEN"]).keep
    desk = RatingDesk(store, images, args.real_share, args.repeat_share, keep)
    for kind, own in by_kind.items():
        if len(own) > AT_ONCE:
            Thread(target=desk.check, args=(own, folders[kind]), daemon=True).start()
    prompts = {file.name: file for file in sorted(Path(args.study_images).glob("*.csv"))} if args.study_images else {}
    studies = Studies(args.studies, study_sources(args), reading, Prompts(prompts, args.model))
    pipe = load_pipeline(args.model)
    # ZeroGPU lends a GPU for a call; everywhere else nothing changes.
    on_gpu = spaces.GPU if spaces is not None else lambda function: function
    model, revision = model_identity(args.model)

    with gr.Blocks(title="minim", analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True) as demo:
        gr.HTML(NAVIGATION.format(' aria-current="page"', ""))
        gr.Markdown("# Synthetic medical images")
        build_generate(Drawer(pipe, model, revision), Limits(images=args.max_images), on_gpu)
    with demo.route("About", "/about", show_in_navbar=False):
        gr.HTML(NAVIGATION.format("", ' aria-current="page"'))
        report = build_about(args.model)
    demo.queue(max_size=args.max_queue, default_concurrency_limit=1)

    health = {"status": "ok", "model": model, "revision": revision, "version": __version__, "images": len(images)}
    routes = [
        Route("/healthz", lambda request: JSONResponse(health)),
        Mount("/pages", StaticFiles(directory=PAGES)),
        *rating_routes(desk),
        *agreement_routes(store, bool(args.show_names)),
        *reader_routes(studies),
        *host_routes(studies, args.host_token),
    ]
    if report is not None:
        routes.append(Route("/report", lambda request: FileResponse(report)))
    return demo, routes


def theme() -> gr.themes.Default:
    """Gradio's own, without fonts from elsewhere, and with enough contrast to be read."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    button = {"button_primary_background_fill": "*primary_700", "button_primary_background_fill_hover": "*primary_800"}
    button |= {f"{name}_dark": shade for name, shade in button.items()}
    quiet = {"body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_400"}
    return gr.themes.Default(primary_hue="blue", **fonts).set(**button, **quiet)


def launch(demo: gr.Blocks, routes: list, args: argparse.Namespace) -> None:
    """Starts to serve, in threads of its own."""
    demo.launch(
        server_name=args.host,
        server_port=args.port,
        share=False,
        show_error=True,
        quiet=True,
        prevent_thread_lock=True,
        app_kwargs={"routes": routes, "middleware": doors(args.max_requests, args.password)},
        theme=theme(),
        css_paths=PAGES / "gradio.css",
        footer_links=[],
        ssr_mode=False,
        max_file_size="1kb",  # nothing is uploaded here
    )


def main(argv=None) -> None:
    try:
        args = parse_args(argv)
        demo, routes = build(args)
        launch(demo, routes, args)
    except (ValueError, OSError, ImportError, httpx.HTTPError) as error:
        sys.exit(f"space/app.py: error: {error}")
    home = f"http://{args.host}:{args.port}"
    print(f"minim is ready: {home}\nFor the host alone: {home}/studies?token={args.host_token}", flush=True)
    demo.block_thread()


if __name__ == "__main__":
    main()
