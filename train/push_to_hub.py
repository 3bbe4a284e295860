"""Publishes a model on the Hugging Face Hub, and with it a Space and a place for ratings.

    python train/push_to_hub.py --model runs/unet/pipeline --repo-id org/minim --private
    python train/push_to_hub.py --repo-id org/minim --space-id org/minim-space --ratings-dataset-id org/minim-ratings
    python train/push_to_hub.py --repo-id org/minim --dry-run

`pipe.push_to_hub(repo_id)` does the first from Python. Everything is made and checked before anything is uploaded. The
token is what `hf auth login` stored, or HF_TOKEN.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from huggingface_hub import HfApi, RepoCard, snapshot_download

from minim_pipeline import EMBEDDED_CHECKPOINT, MinimPipeline
from minim_pipeline.loading import read_model_index
from minim_pipeline.publishing import (
    SPACE_FILES,
    check_folder,
    check_target,
    connect,
    hub_errors,
    publish,
    staged,
    upload,
)


ROOT = Path(__file__).parents[1]
RATINGS_CARD = Path(__file__).with_name("ratings_card.md")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="push_to_hub.py")
    add = parser.add_argument
    add("--model", default=str(EMBEDDED_CHECKPOINT), help="Folder or Hub id of a pipeline; default: the embedded one.")
    add("--repo-id", required=True, help="Where to: owner/name.")
    add("--card", help="The model's card; default: README.md of its folder, or a bare one.")
    add("--report", help="report.json of the model; default: that of its folder.")
    add("--samples", type=int, default=1, help="Pictures of each modality that the card shows.")
    add("--private", action="store_true", default=None, help="What is new becomes private.")
    add("--revision", help="Branch to commit to, made if need be.")
    add("--create-pr", action="store_true", help="Open a pull request.")
    add("--commit-message")
    add("--space-id", help="Create or update this Space too, and point it to the model.")
    add("--ratings-dataset-id", help="Keep the Space's ratings in this dataset repository, made private.")
    add("--dry-run", action="store_true", help="List every file with its size; nothing is asked of the Hub, or sent.")
    args = parser.parse_args(argv)
    if args.samples < 0:
        parser.error(f"--samples has to be 0 or more, got {args.samples}")
    if args.ratings_dataset_id and not args.space_id:
        parser.error("--ratings-dataset-id is where a Space keeps ratings: give --space-id as well")
    return args


def load(model: str) -> MinimPipeline:
    """The pipeline of a folder or of the Hub, with the card and report beside it; never from pickles."""
    read_model_index(model)
    folder = model if Path(model).is_dir() else snapshot_download(model)
    pipe = MinimPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def staged_space(repo_id: str, ratings_id: str | None) -> Iterator[Path]:
    """A temporary folder with the Space's files: `space/`, and the package without its weights beside app.py."""
    with tempfile.TemporaryDirectory(prefix="minim-space-") as temporary:
        folder = Path(temporary)
        unwanted = shutil.ignore_patterns("__pycache__", "checkpoints", ".*")
        shutil.copytree(ROOT / "space", folder, ignore=unwanted, dirs_exist_ok=True)
        shutil.copytree(ROOT / "minim_pipeline", folder / "minim_pipeline", ignore=unwanted)
        card = RepoCard.load(folder / "README.md")
        card.data["models"] = [repo_id]
        card.data["datasets"] = [ratings_id] if ratings_id else None
        card.save(folder / "README.md")
        check_folder(folder, SPACE_FILES)
        yield folder


def push_space(api: HfApi, folder: Path, args: argparse.Namespace) -> str:
    """Creates or updates the Space, and tells it by variables which model it serves and where ratings go."""
    url = upload(
        api,
        folder,
        args.space_id,
        "space",
        replaced=["*.py", "pages/*", "images/*", "minim_pipeline/*"],
        private=args.private,
        commit_message=args.commit_message or f"The pages for {args.repo_id}",
        space_sdk="gradio",
    )
    with hub_errors(f"set the variables of {args.space_id}"):
        api.add_space_variable(args.space_id, "MINIM_MODEL", args.repo_id)
        if args.ratings_dataset_id:
            api.add_space_variable(args.space_id, "MINIM_RATINGS_REPO", args.ratings_dataset_id)
    return url


def push_ratings(api: HfApi, args: argparse.Namespace) -> str:
    """Creates the private dataset repository of ratings; what is in an old one stays."""
    with hub_errors(f"write to {args.ratings_dataset_id}"):
        if api.repo_exists(args.ratings_dataset_id, repo_type="dataset"):
            return f"https://huggingface.co/datasets/{args.ratings_dataset_id}"
        url = api.create_repo(args.ratings_dataset_id, repo_type="dataset", private=True)
        card = RATINGS_CARD.read_text(encoding="utf-8").format(model=args.repo_id).encode()
        api.upload_file(
            path_or_fileobj=card, path_in_repo="README.md", repo_id=args.ratings_dataset_id, repo_type="dataset"
        )
    return url


def list_files(name: str, folder: Path) -> None:
    """Prints every file of a folder with its size in bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files)
    print(f"{name}: {len(files)} files, {total:,} bytes")
    for path in files:
        print(f"{path.stat().st_size:>14,}  {path.relative_to(folder).as_posix()}")


def main(argv=None) -> None:
    args = parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"push_to_hub.py: error: {' '.join(str(error).split())}")


def run(args: argparse.Namespace) -> None:
    papers = {"card": args.card, "report": args.report, "samples": args.samples}
    with ExitStack() as stack:
        api = None
        if not args.dry_run:
            api = connect()
            targets = {"model": args.repo_id, "space": args.space_id, "dataset": args.ratings_dataset_id}
            for kind, target in targets.items():
                if target:
                    check_target(api, target, kind)
        space = stack.enter_context(staged_space(args.repo_id, args.ratings_dataset_id)) if args.space_id else None
        pipe = load(args.model)
        if args.dry_run:
            list_files(args.repo_id, stack.enter_context(staged(pipe, args.repo_id, **papers)))
            if space:
                list_files(args.space_id, space)
            return
        url = publish(
            pipe,
            args.repo_id,
            private=args.private,
            revision=args.revision,
            create_pr=args.create_pr,
            commit_message=args.commit_message,
            **papers,
        )
        print(f"model: {url}")
        if args.ratings_dataset_id:
            print(f"ratings: {push_ratings(api, args)}")
        if space:
            print(f"space: {push_space(api, space, args)}")
        if args.ratings_dataset_id:
            print(
                f"Give the Space a secret HF_TOKEN that may write to {args.ratings_dataset_id}: it is not sent there."
            )


if __name__ == "__main__":
    main()
