"""The pages can be followed: all their commands and blocks of Python run, in miniature.

A page is run from top to bottom in a folder of its own, as a reader would who copies and pastes: what a command
writes, later ones read. Options are those of the page; behind them stand small sizes, and random weights in miniature
take the place of the embedded model and of Stable Diffusion. What needs a GPU, a network or hours (`needs_more`) is
left to test_docs.py, which parses its options.
"""

import csv
import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import forget_accelerator
from pages import FOREIGN, PAGES, ROOT, blocks, run_script, understand, write_options


EMBEDDED = "minim_pipeline/checkpoints/minim-256"
FINDINGS = {"OCT": ["normal", "diabetic macular edema"], "Fundus": ["normal", "glaucoma"]}

# Sizes that come after a page's own options, and so win.
RUN = "--max_train_steps 2 --mixed_precision no"
LATENTS = "--caption_variants 2 --latent_variants 2"
VALIDATED = f"{RUN} --lr_warmup_steps 1 --validation_steps 2 --checkpointing_steps 2 --train_batch_size 4"
UNET = f"{VALIDATED} {LATENTS} --validation_samples 1"
COUNTED = "--min_train 1 --min_val 1"
TUNING = "--tuning_steps 2 --tuning_batch_size 4"
PREFERENCE = (
    f"{VALIDATED} --validation_steps 1 --prompts_per_step 2 --images_per_prompt 2 --timesteps_per_image 1"
    " --watch_images 1"
)
SMALL = {
    "train_text_encoder": "--captions captions.json --teacher miniature/teacher --corpus_size 40 --vocab_size 700"
    " --hidden_size 32 --num_layers 1 --num_heads 2 --max_train_steps 2 --train_batch_size 8",
    "train_autoencoder": f"{VALIDATED} --preset tiny --resolution 64 --crop 32",
    "train_text_to_image": f"{UNET} --resolution 64 --num_inference_steps 2",
    "train_ddo": f"{UNET} --resolution 64 --num_inference_steps 2 --own_images 4",
    "train_classifier": f"{RUN} {COUNTED} --width 16 --resolution 32 --train_batch_size 4",
    "train_encoder": f"{RUN} --width 8 --text_width 16 --projection 12 --resolution 32 --train_batch_size 4"
    " --caption_variants 2",
    "train_filter": f"{VALIDATED} {LATENTS} --resolution 64 --min_train 1 --drawn_images 8 --draw_batch_size 8"
    " --trajectory_steps 2 --train_batch_size 6 --block_out_channels 8 16 --rating_steps 1 --folds 2",
    "calibrate_filter": f"{COUNTED} --prompts_per_modality 4 --batch_size 8 --code_bits 16 --code_versions 2"
    " --mixed_precision no --most_cost 4",
    "tune_filter": TUNING,
    "train_preference": f"{PREFERENCE} {LATENTS} {TUNING}",
    "self_improve": f"{TUNING} --candidates 2 --captions captions.json --judges miniature/judges"
    f" --calibration_images 4 --images_per_finding 2 --pairs 2 --preference '{PREFERENCE}' --skip_memorisation",
    "add_modality": f"{UNET} --teacher_steps 1 --teacher_width 8 --teacher_resolution 32 --filter_steps 2"
    f" --filter_batch_size 6 --drawn_images 8 --draw_batch_size 8 --prompts_per_modality 4 {COUNTED} --most_cost 4",
    "minim generate": "--device cpu --quiet",
    "minim score": "--quiet",
    "minim evaluate": "--sheet-images 2 --device cpu --resolution 64 --extraction-images 1",
}
# Which option names the model, where the page leaves that to the default.
MODEL = {"minim generate": "--model", "minim plan": "--model", "minim score": "--model", "push_to_hub": "--model"}
MODEL |= dict.fromkeys(("self_improve", "add_modality"), "--pretrained_model_name_or_path")
# Options that a miniature does without.
LEFT_OUT = {"--compile", "--gradient_checkpointing"}
MOST_IMAGES = 8  # of one prompt


def needs_more(program: str, arguments: list[str]) -> bool:
    """Whether a command is parsed only: it needs a GPU, a network, or what only a release has."""
    if program.startswith(("bench/", "research/")):
        return True
    if program in ("push_to_hub", "minim push-dataset"):
        return "--dry-run" not in arguments
    return bool({"--downstream", "--extractor"} & set(arguments))


def write_images(folder: Path, modality: str, findings: list[str], count: int) -> list[dict]:
    """Images of 64 px and their rows: of each finding so many in parts A, B and C, and in val."""
    import torch
    from PIL import Image

    rows = []
    for i in range(4 * count * len(findings)):
        finding, place = findings[i % len(findings)], i // len(findings) % 4
        path = f"{folder.name}/{modality}-{i}.png"
        noise = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(i)) * 255
        Image.fromarray(noise.byte().numpy()).resize((64, 64)).save(folder / f"{modality}-{i}.png")
        row = {"path": path, "Text": f"{finding}, case {i % 3}", "modality": modality, "finding": finding}
        rows.append(row | {"split": "val" if place == 3 else "train", "part": "ABC "[place].strip(), "group": path})
    return rows


@pytest.fixture(scope="module")
def world(make_pipeline, tmp_path_factory) -> Path:
    """A folder with what the pages speak of: data, ratings, prompts, and models in miniature."""
    import torch
    from conftest import write_csv
    from peft import LoraConfig, get_peft_model_state_dict
    from transformers import BertConfig, BertModel, BertTokenizer

    from minim_pipeline.evaluation.classifier import make_resnet
    from minim_pipeline.evaluation.judges import Judges

    folder = tmp_path_factory.mktemp("world")
    (folder / "images").mkdir()
    (folder / "docs").symlink_to(ROOT / "docs")
    rows = [row for name in FINDINGS for row in write_images(folder / "images", name, FINDINGS[name], 3)]
    write_csv(folder / "data.csv", rows)
    write_csv(folder / "old.csv", rows)
    write_csv(folder / "train.csv", [row for row in rows if row["split"] == "train"])
    write_csv(folder / "real.csv", [row for row in rows if row["split"] == "val"])
    write_csv(
        folder / "ratings.csv", [row | {"rating": 1 + i % 3} for i, row in enumerate(rows) if row["part"] == "A"]
    )
    prompts = [
        {"Text": finding, "modality": name, "finding": finding} for name in FINDINGS for finding in FINDINGS[name]
    ]
    write_csv(folder / "prompts.csv", prompts)
    write_csv(folder / "new_domain.csv", write_images(folder / "images", "BreastMRI", ["benign", "malignant"], 3))
    write_csv(folder / "skin.csv", write_images(folder / "images", "dermoscopy", ["nevus", "melanoma"], 3))
    captions = {
        name.lower(): {
            finding: {"train": [finding, f"{finding} eye"], "new": [f"Shows {finding}"]} for finding in known
        }
        for name, known in FINDINGS.items()
    }
    (folder / "captions.json").write_text(json.dumps(captions))

    models = folder / "miniature"
    embedded = make_pipeline(
        filtered=True, modalities=[*"oct fundus cxr chest_ct brain_mri breast_us".split()], num_inference_steps=2
    )
    embedded.save_pretrained(models / "embedded")
    (models / "embedded/README.md").write_text((ROOT / EMBEDDED / "README.md").read_text())
    embedded.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    embedded.save_lora_weights(folder / "my_lora", unet_lora_layers=get_peft_model_state_dict(embedded.unet))
    sd = make_pipeline("sd1")
    sd.save_pretrained(models / "sd")
    sd.unet.save_pretrained(folder / "checkpoint/unet")
    torch.manual_seed(0)
    classes = [(name.lower(), finding) for name in FINDINGS for finding in FINDINGS[name]]
    Judges({"cnn": make_resnet(len(classes), 8)}, classes, 32).save_pretrained(models / "judges")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(models / "teacher")
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(models / "teacher")
    return folder


@contextmanager
def own_process() -> Iterator[None]:
    """What a command or a block leaves in this process, the next one does not find, as in a process of its own."""
    from minim_pipeline import modalities

    forget_accelerator()
    tables = (modalities.MODALITIES, modalities._BY_KEY)
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, before):
            table.clear()
            table.update(entries)


@pytest.fixture
def reader(world, tmp_path, monkeypatch):
    """The world as a reader's own folder."""
    import torch

    import minim_pipeline

    torch.set_num_threads(1)
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(minim_pipeline, "EMBEDDED_CHECKPOINT", Path("miniature/embedded").absolute())
    return tmp_path


def in_miniature(program: str, arguments: list[str]) -> list[str]:
    """The arguments with small sizes behind them, and other models in the place of those that are large."""
    places = {EMBEDDED: "miniature/embedded", "CompVis/stable-diffusion-v1-4": "miniature/sd"}
    found = [places.get(argument, argument) for argument in arguments if argument not in LEFT_OUT]
    for i, argument in enumerate(found):
        if argument == "--num-images":
            found[i + 1] = str(min(int(found[i + 1]), MOST_IMAGES))
    if any("runs/sd14" in argument for argument in found):  # the options of a published run
        found += ["--pretrained_model_name_or_path", "miniature/sd"]
    if program in MODEL and MODEL[program] not in found:
        found += [MODEL[program], "miniature/embedded"]
    found += shlex.split(SMALL.get(program, ""))
    if "--curve-guidance" in found:
        found += ["--curve-guidance", "1", "--curve-candidates", "1", "2"]
    if program == "train_text_to_image" and "--preset" in found:
        found += ["--preset", "tiny"]
    return found


def rate(images: Path, store: Path) -> None:
    """What people do on the page that `space/app.py` serves."""
    from minim_pipeline.ratings import Rating, RatingStore, image_digest

    with open(images / "data.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    store.parent.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(rows):
        modality = row["modality"].lower()
        digest = image_digest(images / row["path"])
        RatingStore(store).add(Rating("ann", row["path"], 1 + i % 3, row["Text"], modality, digest=digest))


def follow(words: list[str], monkeypatch) -> None:
    """Runs a command of a page."""
    import minim_pipeline.cli

    program, arguments = understand(words)
    if program in ("make", "pip", *FOREIGN) or needs_more(program, arguments):
        return
    if program == "space/app":
        options = dict(zip(arguments[::2], arguments[1::2]))
        return rate(Path(options["--images"]), Path(options["--store"]))
    arguments = in_miniature(program, arguments)
    if program.startswith("minim "):
        assert minim_pipeline.cli.main([program.split()[1], *arguments]) in (0, 3)
        return
    with monkeypatch.context() as patch:
        run_script(program, arguments, patch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_a_page_can_be_followed_from_top_to_bottom(page, reader, monkeypatch):
    write_options(page)
    for block in blocks(page):
        if block.language == "python":
            with own_process():
                exec(compile(block.text, f"{page.name}:{block.line}", "exec"), {"__name__": "__main__"})
        for line, words in block.commands if block.language == "sh" else ():
            try:
                with own_process():
                    follow(words, monkeypatch)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{page.name}:{line}: {shlex.join(words)}: {error}") from error
