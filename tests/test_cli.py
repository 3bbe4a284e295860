import csv
import io
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from minim_pipeline.cli import main
from minim_pipeline.data.sources import read_dataset
from minim_pipeline.generate.plan import plan_file
from minim_pipeline.loading import SCHEDULERS
from minim_pipeline.provenance import read_provenance


def run(pipeline_dir, out, *options):
    """`minim generate` with a tiny model on the CPU; later options win over the first ones."""
    common = ["--model", str(pipeline_dir), "--output-dir", str(out), "--device", "cpu", "--quiet"]
    return main(["generate", *common, *map(str, options)])


ONE_PROMPT = ("--modality", "OCT", "--prompt", "macular edema, left eye", "--num-images", 3, "--seed", 7)


@pytest.fixture(scope="module")
def filtered_dir(make_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "filtered"
    make_pipeline(filtered=True, num_candidates=2).save_pretrained(folder)
    return folder


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(float) / 255


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def table(path, header, *rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def no_drawing(monkeypatch):
    """Fails if images are drawn; gives what `generate` was called with, for tests of arguments alone."""
    calls = []

    def generate(items, folder, options):
        calls.append((items, replace(options, output_dir=folder)))

    monkeypatch.setattr("minim_pipeline.generate.command.generate", generate)
    return calls


def test_one_prompt(pipeline_dir, tmp_path, capsys):
    assert run(pipeline_dir, tmp_path / "out", *ONE_PROMPT) == 0
    listed = ["data.csv", "grid.png", "metadata.csv", "run.json"]
    assert names(tmp_path / "out") == ["0000.png", "0001.png", "0002.png", *listed]
    rows = read_dataset(tmp_path / "out/data.csv")
    assert [row["seed"] for row in rows] == ["7", "8", "9"]
    assert {(row["Text"], row["modality"], row["synthetic"]) for row in rows} == {
        ("macular edema, left eye", "OCT", "true")
    }
    found = read_provenance(tmp_path / "out/0001.png")
    assert found.items() >= {
        "synthetic": True,
        "model": "minim-tiny",
        "revision": rows[0]["revision"],
        "modality": "oct",
        "prompt": "macular edema, left eye",
        "seed": 8,
        "steps": 3,
        "guidance": 2.0,
        "scheduler": "DPMSolverMultistepScheduler",
    }.items()  # fmt: skip
    assert str(pipeline_dir.parent) not in str(found)
    with Image.open(tmp_path / "out/0001.png") as image:
        assert image.mode == "L", "of a grey modality"
    assert read_provenance(tmp_path / "out/grid.png")["seeds"] == "7, 8, 9"
    assert pixels(tmp_path / "out/grid.png").shape == (128, 128, 3)
    assert capsys.readouterr().err == ""  # --quiet


def test_an_image_depends_on_its_seed_alone(pipeline_dir, tmp_path):
    run(pipeline_dir, tmp_path / "three", *ONE_PROMPT, "--batch-size", 3)
    run(pipeline_dir, tmp_path / "two", *ONE_PROMPT, "--batch-size", 2)
    run(pipeline_dir, tmp_path / "last", *ONE_PROMPT, "--num-images", 1, "--seed", 9)
    last = pixels(tmp_path / "three/0002.png")
    assert np.abs(last - pixels(tmp_path / "two/0002.png")).max() < 1 / 200
    assert np.abs(last - pixels(tmp_path / "last/0000.png")).max() < 1 / 200
    assert np.abs(last - pixels(tmp_path / "three/0001.png")).max() > 1 / 20


def test_prompts_file_carries_columns_through(pipeline_dir, tmp_path):
    path = table(
        tmp_path / "prompts.csv",
        ["path", "Text", "modal", "num_images", "seed", "finding"],
        ["real/a.png", "edema", "OCT", "2", "100", "dme"],
        ["real/b.png", "no retinopathy", "fundus", "", "", "normal"],
        ["", "CXR: effusion", "chest x-ray", "", "", ""],
    )
    assert run(pipeline_dir, tmp_path / "out", "--prompts-file", path, "--seed", 5) == 0
    rows = read_dataset(tmp_path / "out/data.csv")
    assert [(row["path"], row["modality"], row["seed"], row["finding"], row["source_path"]) for row in rows] == [
        ("0000.png", "OCT", "100", "dme", "real/a.png"),
        ("0001.png", "OCT", "101", "dme", "real/a.png"),
        ("0002.png", "Fundus", "7", "normal", "real/b.png"),
        ("0003.png", "CXR", "8", "", ""),
    ]


def test_prompts_may_stand_in_columns_of_other_names(pipeline_dir, tmp_path, capsys):
    path = table(tmp_path / "p.csv", ["report", "kind", "dx"], ["edema", "OCT", "dme"], ["drusen", "OCT", "amd"])
    names = ["--caption-column", "report", "--modality-column", "kind", "--finding-column", "dx"]
    assert run(pipeline_dir, tmp_path / "out", "--prompts-file", path, *names) == 0
    rows = read_dataset(tmp_path / "out/data.csv")
    assert [(row["Text"], row["modality"], row["finding"]) for row in rows] == [
        ("edema", "OCT", "dme"),
        ("drusen", "OCT", "amd"),
    ]
    assert run(pipeline_dir, tmp_path / "no", *ONE_PROMPT, "--caption-column", "report") == 2
    assert "--caption-column belong to --prompts-file" in capsys.readouterr().err


def test_every_row_has_seeds_of_its_own(tmp_path):
    path = table(tmp_path / "prompts.csv", ["Text", "modality"], ["edema", "OCT"], ["drusen", "OCT"])
    assert [item.seed for item in plan_file(path, num_images=3, seed=10)] == [10, 11, 12, 13, 14, 15]


def test_goes_on_after_ctrl_c_and_repeats_nothing(pipeline_dir, tmp_path, monkeypatch, capsys):
    from minim_pipeline.generate import draw as generate

    drawn = []
    draw = generate.draw

    def interrupted(pipe, batch, *args, **kwargs):
        drawn.extend(item.index for item in batch)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(pipe, batch, *args, **kwargs)

    monkeypatch.setattr(generate, "draw", interrupted)
    options = [*ONE_PROMPT, "--batch-size", 1]
    assert run(pipeline_dir, tmp_path / "out", *options) == 130
    assert "2 of 3 images are in" in capsys.readouterr().err
    assert names(tmp_path / "out") == ["0000.png", "0001.png", "data.csv", "run.json"]
    assert len(read_dataset(tmp_path / "out/data.csv")) == 2

    assert run(pipeline_dir, tmp_path / "out", *options) == 0
    assert drawn == [0, 1, 2, 2]
    run(pipeline_dir, tmp_path / "at_once", *options)
    for name in ("0000.png", "0001.png", "0002.png", "grid.png", "data.csv", "metadata.csv", "run.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "at_once" / name).read_bytes()

    drawn.clear()
    assert run(pipeline_dir, tmp_path / "out", *options, "--num-images", 5) == 0  # more of the same is no other run
    assert drawn == [3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-inference-steps", 2), "steps: 3 there, 2 now"),
        (("--prompt", "drusen"), "Text: 'macular edema, left eye' there, 'drusen' now"),
        (("--seed", 8), "seed: '7' there, '8' now"),
        (("--scheduler", "ddim"), "scheduler: 'DPMSolverMultistepScheduler' there, 'DDIMScheduler' now"),
    ],
)
def test_a_folder_with_a_run_of_other_settings(pipeline_dir, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    run(pipeline_dir, out, *ONE_PROMPT, "--num-images", 1)
    before = {name: (out / name).read_bytes() for name in names(out)}
    assert run(pipeline_dir, out, *ONE_PROMPT, "--num-images", 1, *options) == 2
    assert message in capsys.readouterr().err
    assert before == {name: (out / name).read_bytes() for name in names(out)}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(pipeline_dir, tmp_path, scheduler):
    options = (*ONE_PROMPT, "--num-images", 1, "--scheduler", scheduler, "--num-inference-steps", 4)
    assert run(pipeline_dir, tmp_path, *options) == 0
    assert read_provenance(tmp_path / "0000.png")["scheduler"] == SCHEDULERS[scheduler]
    assert pixels(tmp_path / "0000.png").std() > 0


def test_other_options(pipeline_dir, tmp_path):
    options = (
        "--height",
        32,
        "--width",
        48,
        "--negative-prompt",
        "blur",
        "--guidance-scale",
        3,
        "--dtype",
        "bfloat16",
    )
    assert run(pipeline_dir, tmp_path, *ONE_PROMPT, *options, "--num-images", 1) == 0
    assert pixels(tmp_path / "0000.png").shape == (32, 48, 3)
    found = read_provenance(tmp_path / "0000.png")
    assert (found["guidance"], found["negative_prompt"], found["dtype"]) == (3.0, "blur", "bfloat16")


def test_lora(pipeline_dir, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from minim_pipeline import MinimPipeline

    pipe = MinimPipeline.from_pretrained(pipeline_dir)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    MinimPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(pipe.unet))

    options = (*ONE_PROMPT, "--num-images", 1)
    assert run(pipeline_dir, tmp_path / "with", *options, "--lora", tmp_path / "lora") == 0
    run(pipeline_dir, tmp_path / "without", *options)
    assert np.abs(pixels(tmp_path / "with/0000.png") - pixels(tmp_path / "without/0000.png")).max() > 0
    assert read_provenance(tmp_path / "with/0000.png")["lora"].startswith("lora sha256-")


def test_a_lora_of_another_model_is_refused_and_pefts_own_is_taken(pipeline_dir, tmp_path, capsys):
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    from minim_pipeline import MinimPipeline

    name = "transformer.single_transformer_blocks.0.attn.to_q.lora_{}.weight"
    save_file({name.format("A"): torch.ones(2, 9), name.format("B"): torch.ones(9, 2)}, tmp_path / "flux.safetensors")
    options = (*ONE_PROMPT, "--num-images", 1, "--lora")
    assert run(pipeline_dir, tmp_path / "out", *options, tmp_path / "flux.safetensors") == 2
    err = capsys.readouterr().err
    assert "holds no LoRA for this model: Nothing of" in err and "'transformer.single_transformer_blocks.0" in err
    assert not (tmp_path / "out").exists()

    pipe = MinimPipeline.from_pretrained(pipeline_dir)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    get_peft_model(pipe.unet, config).save_pretrained(tmp_path / "peft")
    assert run(pipeline_dir, tmp_path / "with", *options, tmp_path / "peft") == 0
    run(pipeline_dir, tmp_path / "without", *options[:-1])
    assert np.abs(pixels(tmp_path / "with/0000.png") - pixels(tmp_path / "without/0000.png")).max() > 0
    first = read_provenance(tmp_path / "with/0000.png")["lora"]
    settings = tmp_path / "peft/adapter_config.json"
    settings.write_text(settings.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    assert run(pipeline_dir, tmp_path / "stronger", *options, tmp_path / "peft") == 0
    assert read_provenance(tmp_path / "stronger/0000.png")["lora"] != first, "it is another one"


def test_a_modality_that_the_model_has_not_learned_is_told_and_recorded(make_pipeline, pipeline_dir, tmp_path, caplog):
    from minim_pipeline.notices import warn_once

    warn_once.cache_clear()
    make_pipeline("sd1").save_pretrained(tmp_path / "base")
    options = (*ONE_PROMPT, "--num-images", 2, "--batch-size", 1, "--num-inference-steps", 3)
    assert run(tmp_path / "base", tmp_path / "out", *options) == 0
    assert sum("names no modality that it has learned" in message for message in caplog.messages) == 1
    assert [row["modality_learned"] for row in read_dataset(tmp_path / "out/data.csv")] == ["false"] * 2
    assert read_provenance(tmp_path / "out/0001.png")["modality_learned"] == "false"
    assert run(pipeline_dir, tmp_path / "learned", *options) == 0
    assert "modality_learned" not in read_dataset(tmp_path / "learned/data.csv")[0]


def test_a_size_that_the_model_has_not_learned_is_told(pipeline_dir, tmp_path, caplog, capsys):
    from minim_pipeline.notices import warn_once

    warn_once.cache_clear()
    assert run(pipeline_dir, tmp_path, *ONE_PROMPT, "--height", 128, "--batch-size", 1) == 0
    assert sum("128 x 64 (height x width) is no size that this" in message for message in caplog.messages) == 1
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert any(line.startswith("128 x 64 (height x width)") for line in lines), "not behind the bar"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--modality", "PET"), "Unknown modality 'PET'; known: 'oct'"),
        (("--modality", "MRI"), "ambiguous"),
        (("--modality", "BreastUS"), "not been trained on it; trained: 'oct', 'fundus'"),
        (("--prompt", " "), "--prompt has to say what the image shows"),
        (("--prompt", "CXR: effusion"), "begins with 'CXR', but `modality` is 'oct'"),
        (("--num-images", "0"), "--num-images: has to be a whole number from 1 on, got '0'"),
        (("--num-images", "two"), "got 'two'"),
        (("--seed", "-1"), "has to be a whole number from 0 on"),
        (("--height", "100"), "has to be a whole number from 8 on, a multiple of 8, got '100'"),
        (("--guidance-scale", "nan"), "got 'nan'"),
        (("--scheduler", "pndm"), "ddim"),
        (("--dtype", "int8"), "bfloat16"),
        (("--device", "gpu"), "device 'gpu' cannot be used here"),
        (("--model", "/no/such/model"), "'/no/such/model' is no model"),
        (("--model", "no/such-model"), "neither a folder nor a model that the Hub gives"),
        (("--prompts-file", "a.csv"), "leave --prompt out"),
        (("--prompt", "NaN"), "'NaN' is no caption"),
        (("--negative-prompt", "null"), "'null' is no caption"),
        (("--unet", "/no/such/unet"), "--unet '/no/such/unet' is no folder of a U-Net"),
        (("--colour",), "unknown arguments --colour"),
        (("--prompt", "a\udcffb"), "--prompt is not UTF-8: 'a\\udcffb'"),
        (("--negative-prompt", "\udcff"), "--negative-prompt is not UTF-8"),
        (("--seed", 2**63 - 1), "seed has to be at most 9223372036854775807 for the last image too"),
        # More than any machine can promise: 2^47 bytes of addresses end before it, also where memory is overcommitted.
        (("--height", 80_000_000, "--width", 80_000_000), "3 images of 80000000 x 80000000 px at once do not fit"),
        (("--device", "meta"), "device 'meta' cannot be used here"),
        (("--lora", "/no/such/lora"), "'/no/such/lora' holds no LoRA for this model"),
    ],
)
def test_bad_input(pipeline_dir, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    try:
        code = run(pipeline_dir, tmp_path / "out", *ONE_PROMPT, *options)
    except SystemExit as error:  # what argparse finds
        code = error.code
    assert code == 2
    err = capsys.readouterr().err
    assert message in err
    lines = [line for line in err.splitlines() if "is no size that this model has learned" not in line]
    assert len(lines) == 1 and lines[0].startswith("minim generate: error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (["caption", "modality"], ["edema", "OCT"], "lacks the column 'Text'; found: 'caption', 'modality'"),
        (["Text", "modality"], ["edema", "PET"], "row 2 (line 3): Unknown modality 'PET'"),
        (["Text", "modality"], ["edema", "BreastMRI"], "row 2 (line 3): modality 'breast_mri' is known, but"),
        (["Text", "modality"], ["Fundus: drusen", "OCT"], "begins with 'Fundus'"),
        (
            ["Text", "modality", "seed"],
            ["edema", " left eye", "OCT", "1"],
            "row 2 (line 3): 4 fields, the header has 3",
        ),
        (
            ["Text", "modality", "num_images"],
            ["edema", "OCT", "0"],
            "row 2 (line 3): num_images has to be a whole number from 1",
        ),
        (["Text", "modality", "seed"], ["edema", "OCT", "x"], "row 2 (line 3): seed has to be a whole number from 0"),
        (["Text", "modality", "seed"], ["edema", "OCT", str(2**63)], "row 2 (line 3): seed has to be a whole number"),
    ],
)
def test_bad_prompts_files(pipeline_dir, tmp_path, capsys, header, row, message):
    path = table(tmp_path / "prompts.csv", header, ["edema", "OCT", "1"][: len(header)], row)
    assert run(pipeline_dir, tmp_path / "out", "--prompts-file", path) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_left_out_if_asked_to(pipeline_dir, tmp_path, capsys, no_drawing):
    rows = (["a", "OCT", "1"], ["b", "PET", "1"], ["c", "BreastUS", "1"], ["d", "OCT", "0"], ["e", "OCT"])
    path = table(tmp_path / "prompts.csv", ["Text", "modality", "num_images"], *rows)
    assert run(pipeline_dir, tmp_path / "out", "--prompts-file", path, "--skip-bad-rows") == 0
    assert [item.text for item in no_drawing[0][0]] == ["a"]
    err = capsys.readouterr().err
    assert err.startswith("minim generate: warning: Left out: ") and "generate.py" not in err
    assert [f"row {number} (line {number + 1})" in err for number in range(1, 6)] == [False, True, True, True, True]


def test_an_image_is_drawn_again_from_its_provenance(pipeline_dir, tmp_path):
    from minim_pipeline.loading import load_pipeline

    options = ("--scheduler", "ddim", "--guidance-scale", 3, "--negative-prompt", "blur", "--height", 32)
    assert run(pipeline_dir, tmp_path, *ONE_PROMPT, *options) == 0
    found = read_provenance(tmp_path / "0001.png")
    assert (found["height"], found["width"], found["guidance_rescale"]) == (32, 64, 0.5)
    assert found["guidance_interval"] == [0.0, 1.0]
    pipe = load_pipeline(str(pipeline_dir), found["scheduler"], device="cpu", dtype=found["dtype"])
    (again,) = pipe(
        found["prompt"],
        modality=found["modality"],
        seeds=[found["seed"]],
        num_inference_steps=found["steps"],
        guidance_scale=found["guidance"],
        **{name: found[name] for name in ("guidance_rescale", "guidance_interval", "height", "width")},
        negative_prompt=found["negative_prompt"],
    ).images
    assert np.abs(np.asarray(again) / 255 - pixels(tmp_path / "0001.png")).max() < 1 / 200


def test_columns_of_the_writers_own_are_not_carried_through(pipeline_dir, tmp_path):
    path = table(tmp_path / "prompts.csv", ["Text", "modality", "negative_prompt", "width"], ["a", "OCT", "blur", "9"])
    assert run(pipeline_dir, tmp_path / "out", "--prompts-file", path) == 0
    (row,) = read_dataset(tmp_path / "out/data.csv")
    assert (row["negative_prompt"], row["width"]) == ("", "64")


@pytest.mark.parametrize("text", ["{bad", "[1]"])
@pytest.mark.parametrize("name", ["run.json", "model_index.json"])
def test_broken_files_are_named(pipeline_dir, tmp_path, capsys, name, text):
    (tmp_path / name).write_text(text)
    model = tmp_path if name == "model_index.json" else pipeline_dir
    assert run(pipeline_dir, tmp_path, *ONE_PROMPT, "--model", model) == 2
    err = capsys.readouterr().err
    assert str(tmp_path / name) in err and err.count("\n") == 1
    assert names(tmp_path) == [name]


def test_broken_weights(pipeline_dir, tmp_path, capsys):
    shutil.copytree(pipeline_dir, tmp_path / "model")
    (tmp_path / "model/text_encoder/model.safetensors").write_bytes(b"xx")
    assert run(tmp_path / "model", tmp_path / "out", *ONE_PROMPT) == 2
    assert "has broken weights" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["modalities", "generate"])
def test_without_the_embedded_model(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr("minim_pipeline.loading.EMBEDDED_CHECKPOINT", tmp_path)
    assert main([command, "--model", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "the embedded model is missing" in err and "--model" in err and err.count("\n") == 1


def test_a_model_on_the_hub_is_downloaded(pipeline_dir, monkeypatch):
    """diffusers takes every list in model_index.json for a component, unless it holds no strings."""
    import json

    from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders

    from minim_pipeline.loading import read_model_index

    index = json.loads((pipeline_dir / "model_index.json").read_text())
    assert _get_custom_components_and_folders("org/minim", index, [])[0] == {}
    assert read_model_index(str(pipeline_dir))["modalities"] == ["oct", "fundus", "cxr", "chest_ct", "brain_mri"]


def test_nothing_is_said_about_annotations(pipeline_dir, tmp_path, monkeypatch):
    """diffusers warns at every load of those that it cannot read."""
    said = []
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.logger.warning", lambda *message: said.append(message))
    run(pipeline_dir, tmp_path, *ONE_PROMPT, "--num-images", 1)
    assert not said


@pytest.mark.parametrize("options", [{"scheduler": "pndm"}, {"dtype": "int8"}, {"batch_size": 0}, {"items": []}])
def test_bad_arguments_in_python(pipeline_dir, tmp_path, options):
    from minim_pipeline.generate.options import GenerateOptions
    from minim_pipeline.generate.plan import plan_prompt
    from minim_pipeline.generate.write import generate
    from minim_pipeline.modalities import MODALITIES

    items = options.pop("items", plan_prompt("edema", MODALITIES["oct"], 1, 0))
    with pytest.raises(ValueError, match="has to be|nothing to draw"):
        generate(items, tmp_path / "out", GenerateOptions(model=str(pipeline_dir), **options))
    assert not (tmp_path / "out").exists()


def test_missing_prompts_file(pipeline_dir, tmp_path, capsys):
    assert run(pipeline_dir, tmp_path / "out", "--prompts-file", tmp_path / "none.csv") == 2
    assert "No such file" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_asks_at_a_terminal_for_what_is_missing(pipeline_dir, tmp_path, monkeypatch, capsys, no_drawing):
    answers = ["PET", "oct", "", "macular edema", "0", "", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join(answers) + "\n"))
    assert main(["generate", "--model", str(pipeline_dir), "--quiet"]) == 0
    items, options = no_drawing[0]
    assert [(item.text, item.modality.id, item.seed) for item in items] == [
        ("macular edema", "oct", seed) for seed in range(4)
    ]
    assert options.output_dir == tmp_path / "out"
    asked = capsys.readouterr().out
    assert "Modality (OCT, Fundus, CXR, ChestCT, BrainMRI)" in asked
    assert "Unknown modality 'PET'" in asked
    assert "got '0'" in asked


def test_underscores_do_for_hyphens(pipeline_dir, tmp_path, no_drawing):
    options = ["--num_images", 2, "--negative_prompt=motion_blur"]
    assert run(pipeline_dir, tmp_path / "an_out", *ONE_PROMPT[:4], *options) == 0
    items, given = no_drawing[0]
    assert (len(items), given.negative_prompt, given.output_dir.name) == (2, "motion_blur", "an_out")


def test_no_answer(pipeline_dir, monkeypatch, capsys, no_drawing):
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert main(["generate", "--model", str(pipeline_dir)]) == 2
    assert not no_drawing


def test_asks_nobody_elsewhere(pipeline_dir, monkeypatch, capsys, no_drawing):
    monkeypatch.setattr(sys, "stdin", io.StringIO("oct\n"))
    assert main(["generate", "--model", str(pipeline_dir), "--prompt", "edema"]) == 2
    assert "--modality, --output-dir missing" in capsys.readouterr().err
    assert not no_drawing


def test_minims_own_way_to_name_the_modality(pipeline_dir, tmp_path, no_drawing):
    assert run(pipeline_dir, tmp_path, "--prompt", "Chest CT: COVID-19 pneumonia", "--num-images", 1) == 0
    (item,) = no_drawing[0][0]
    assert (item.modality.id, item.text) == ("chest_ct", "COVID-19 pneumonia")


def test_modalities(pipeline_dir, capsys):
    assert main(["modalities", "--model", str(pipeline_dir)]) == 0
    listed = capsys.readouterr().out
    assert (
        "OCT (oct), grey\n  also: optical coherence tomography\n  findings: normal, diabetic macular edema\n" in listed
    )
    assert "Fundus (fundus), colour" in listed
    assert "BreastUS (breast_us), grey\n  also: breast ultrasound, breast ultrasonography\n  not learned" in listed


def test_help_and_lists_do_without_torch(pipeline_dir):
    code = (
        "import sys; from minim_pipeline.cli import main\n"
        f"main(['modalities', '--model', {str(pipeline_dir)!r}])\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate'} & set(sys.modules); assert not heavy, heavy\n"
        "main(['generate', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--prompts-file" in done.stdout


@pytest.mark.slow
def test_two_processes_share_the_work(nursery, pipeline_dir, tmp_path):
    options = ["--model", pipeline_dir, *ONE_PROMPT, "--num-images", "5", "--batch-size", "1", "--device", "cpu"]
    command = ["-m", "minim_pipeline.cli", "generate", *options, "--output-dir", tmp_path / "two"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "CUDA_VISIBLE_DEVICES": ""}
    # What torchrun sets.
    both = [
        nursery.start(*command, **place, WORLD_SIZE="2", RANK=rank, LOCAL_WORLD_SIZE="2", LOCAL_RANK=rank)
        for rank in "01"
    ]
    assert [process.wait() for process in both] == [0, 0], [process.said() for process in both]
    assert "/3 images" in both[0].said(), "the first draws three of five"
    assert run(pipeline_dir, tmp_path / "one", *ONE_PROMPT, "--num-images", 5, "--batch-size", 1) == 0
    assert names(tmp_path / "two") == names(tmp_path / "one")
    for name in names(tmp_path / "one"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_the_filter_chooses_and_says_so(filtered_dir, tmp_path, capsys):
    from minim_pipeline import MinimPipeline

    options = [option for option in ONE_PROMPT if option != "--quiet"]
    common = ["--model", str(filtered_dir), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["generate", *common, *map(str, options), "--num-candidates", "3", "--max-rounds", "2"]) == 0
    rows = read_dataset(tmp_path / "out/data.csv")
    assert [row["seed"] for row in rows] == ["7", "8", "9"] and {row["candidates"] for row in rows} <= {"3", "6"}
    assert all(1 <= float(row["score"]) <= 3 and row["accepted"] == "true" for row in rows)
    said = capsys.readouterr().err
    drawn = sum(int(row["candidates"]) for row in rows)
    left_out = [sum(int(row[f"rejected_{name}"]) for row in rows) for name in ("quality", "finding", "copy")]
    assert sum(left_out) == drawn - 3, "one of each image's candidates comes back"
    assert f"accepted 3 of 3 images. Of {drawn} candidates it left out {drawn - 3}: {left_out[0]} for" in said
    found = read_provenance(tmp_path / "out/0001.png")
    assert str(found["seed"]) == rows[1]["drawn_seed"] != "8"
    pipe = MinimPipeline.from_pretrained(filtered_dir)
    again = pipe(rows[1]["Text"], modality="oct", seeds=[found["seed"]], use_filter=False).images[0]
    assert np.abs(np.asarray(again).astype(float) / 255 - pixels(tmp_path / "out/0001.png")).max() <= 2 / 255

    assert run(filtered_dir, tmp_path / "off", *ONE_PROMPT, "--no-filter") == 0
    assert "accepted" not in read_dataset(tmp_path / "off/data.csv")[0]


@pytest.mark.parametrize("least", [-1e9, 1e9])
def test_what_does_not_look_real_is_counted_and_told(make_pipeline, tmp_path, capsys, least):
    pipe = make_pipeline(realism=True, num_candidates=2)
    entry = {"score": 1.0, "finding": 1.0, "realism": least}
    pipe.filter_head.register_to_config(stages=(), calibration={"oct": entry})
    pipe.save_pretrained(tmp_path / "model")
    options = [option for option in ONE_PROMPT if option != "--quiet"]
    common = ["--model", str(tmp_path / "model"), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["generate", *common, *map(str, options)]) == 0
    rows = read_dataset(tmp_path / "out/data.csv")
    counts = [int(row["rejected_realism"]) for row in rows]
    assert counts == [2 if least > 0 else 0] * 3
    assert f"copies of training images, {sum(counts)} as unlike real images." in capsys.readouterr().err
    assert main(["score", "--data", str(tmp_path / "out/data.csv"), "--device", "cpu", *common[:2]]) == 0
    scored = read_dataset(tmp_path / "out/data-scored.csv")
    assert {row["reason"] for row in scored} == ({"realism"} if least > 0 else {""})
    assert len({float(row["realism"]) for row in scored}) == 3


def test_numbers_that_may_be_broken_are_taken_so(no_drawing, tmp_path):
    options = ["--guidance-scale", "2.5", "--filter-threshold", "2.25"]
    assert main(["generate", *ONE_PROMPT[:4], *options, "--output-dir", str(tmp_path / "out"), "--quiet"]) in (0, 2)
    assert (no_drawing[0][1].guidance_scale, no_drawing[0][1].filter_threshold) == (2.5, 2.25)


def test_copies_may_be_accepted(filtered_dir, tmp_path):
    assert run(filtered_dir, tmp_path / "out", *ONE_PROMPT, "--keep-copies") == 0
    assert len(read_dataset(tmp_path / "out/data.csv")) == 3
    assert read_provenance(tmp_path / "out/0000.png")["keep_copies"] == "True"


def test_options_of_a_filter_that_is_not_there_are_told(pipeline_dir, filtered_dir, tmp_path, capsys):
    for model, option, message in (
        (pipeline_dir, ["--num-candidates", "2"], "has no filter to choose with"),
        (filtered_dir, ["--no-filter", "--max-rounds", "2"], "no_filter leaves it out"),
        (filtered_dir, ["--filter-threshold", "5"], "score from 1 to 3, got 5"),
    ):
        assert run(model, tmp_path / "out", *ONE_PROMPT, *option) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_any_images_can_be_scored(filtered_dir, pipeline_dir, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.fromarray(np.full((50, 70, 3), 60 * i, dtype=np.uint8)).save(tmp_path / f"images/{i}.png")
    rows = [[f"images/{i}.png", "normal", ("OCT", "CXR")[i // 2], i] for i in range(3)]
    data = table(tmp_path / "data.csv", ["path", "Text", "modality", "finding"], *rows)
    command = ["score", "--data", str(data), "--device", "cpu", "--batch-size", "2", "--model"]
    assert main([*command, str(filtered_dir)]) == 0
    scored = read_dataset(tmp_path / "data-scored.csv")  # checks that the paths lead to the images
    assert [row["finding"] for row in scored] == ["0", "1", "2"], "a column of the data, and no rating"
    for row in scored:
        score, quality, finding = (float(row[name]) for name in ("score", "quality_rating", "finding_rating"))
        assert score == pytest.approx(1 + (quality - 1) * (finding - 1) / 2, abs=1e-3)
    said = capsys.readouterr().err
    assert "OCT: 2 of 2 accepted, mean score" in said and "CXR: 1 of 1" in said and "data-scored.csv" in said

    assert main([*command, str(filtered_dir), "--quiet", "--output", str(tmp_path / "elsewhere/s.csv")]) == 0
    assert read_dataset(tmp_path / "elsewhere/s.csv")[0]["path"] == "../images/0.png"
    assert main([*command, str(pipeline_dir)]) == 2 and "has no filter to score with" in capsys.readouterr().err


def test_a_csv_of_another_machine_can_be_scored(filtered_dir, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.fromarray(np.full((50, 70, 3), 60 * i, dtype=np.uint8)).save(tmp_path / f"images/{i}.png")
    rows = [[f"/data2404/somebody/images/{i}.png", "Drusen, left eye"] for i in range(2)]
    data = table(tmp_path / "theirs.csv", ["path", "Text"], *rows)
    command = ["score", "--data", str(data), "--device", "cpu", "--quiet", "--model", str(filtered_dir)]
    assert main(command) == 2
    assert main([*command, "--modality", "OCT", "--image-root", str(tmp_path / "images")]) == 0
    scored = read_dataset(tmp_path / "theirs-scored.csv")
    assert [row["path"] for row in scored] == ["images/0.png", "images/1.png"] and scored[0]["modality"] == "OCT"


def test_one_modality_for_a_file_of_prompts(pipeline_dir, tmp_path, no_drawing):
    prompts = table(tmp_path / "prompts.csv", ["Text"], ["edema"], ["drusen, left eye"])
    assert run(pipeline_dir, tmp_path / "out", "--prompts-file", prompts, "--modality", "Fundus") == 0
    ((items, _),) = no_drawing
    assert [(item.text, item.modality.id) for item in items] == [("edema", "fundus"), ("drusen, left eye", "fundus")]
