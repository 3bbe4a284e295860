"""A MinimPipeline of the real classes in miniature, with random weights: 64 px images, milliseconds a call.

diffusers is imported where it is needed, so that tests of the rest do not wait for it.
"""

import csv
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What `datasets` unpacks for tests is not to fill the cache of whoever runs them.
os.environ.setdefault("HF_DATASETS_CACHE", str(Path(tempfile.gettempdir()) / "minim-tests-datasets"))

MODALITIES = ["oct", "fundus", "cxr", "chest_ct", "brain_mri"]
FINDINGS = {"oct": ["normal", "diabetic macular edema"], "fundus": ["no retinopathy"], "cxr": ["effusion"]}


def write_csv(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def forget_accelerator() -> None:
    """The next Accelerator is made as in a process of its own, of any precision."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def run_script(module, *arguments):
    """What the `main` of a script gives for these arguments, called as in a process of its own."""
    forget_accelerator()
    return module.main([str(argument) for argument in arguments])


@contextmanager
def small_classifiers() -> Iterator[None]:
    """What a stand-in is made of is trained in batches of eight, on 32 px."""
    from minim_pipeline.training import classifier, stand_in

    def recipe_of(architecture, **given):
        return original(architecture, **given | {"train_batch_size": 8, "resolution": 32})

    original = classifier.recipe_of
    with pytest.MonkeyPatch.context() as patch:
        for module in (classifier, stand_in):
            patch.setattr(module, "recipe_of", recipe_of)
        yield


def _tokenizer(folder: Path, max_length: int):
    """CLIP's tokenizer over single bytes, without merges of its own: a token a letter."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=max_length)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """Starts fresh processes, offline and with a cache of their own."""
    from fresh import Nursery

    started = Nursery(os.environ | {"HF_HOME": str(tmp_path_factory.mktemp("cache"))})
    yield started
    started.close()


@pytest.fixture(scope="session")
def make_pipeline(tmp_path_factory) -> Callable:
    """Builds tiny pipelines: `make_pipeline(kind="minim" | "sd1", **arguments of MinimPipeline)`.

    `"minim"` is like the embedded model (8 latent channels, v-prediction, zero terminal SNR, modality tokens), `"sd1"`
    like Stable Diffusion 1.x (4 latent channels, epsilon, PNDM, no tokens, the old `eos_token_id` of 2). With
    `filtered=True` it has a filter head with random weights, with `realism=True` one that rates realism, too.
    """
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from minim_pipeline import MinimPipeline, add_modality_tokens

    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays: the trainers' collections of garbage need not go through it each time

    def make(kind: str = "minim", filtered: bool = False, realism: bool = False, **kwargs) -> MinimPipeline:
        torch.manual_seed(0)
        tokenizer = _tokenizer(tmp_path_factory.mktemp("tokenizer"), max_length=48)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=48,
                bos_token_id=0,
                eos_token_id=2,
            )
        )
        channels = 8 if kind == "minim" else 4
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=channels,
            norm_num_groups=4,
            scaling_factor=1.0 if kind == "minim" else 0.18215,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        )
        if kind == "minim":
            add_modality_tokens(tokenizer, text_encoder, MODALITIES)
            scheduler = DPMSolverMultistepScheduler(
                prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
            )
            defaults = {"modalities": MODALITIES, "findings": FINDINGS, "num_inference_steps": 3}
            kwargs = {**defaults, "guidance_scale": 2.0, "guidance_rescale": 0.5, **kwargs}
        else:
            scheduler = PNDMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
            )
        components = {
            "vae": vae.eval(),
            "text_encoder": text_encoder.eval(),
            "tokenizer": tokenizer,
            "unet": unet.eval(),
            "scheduler": scheduler,
            "filter_head": None,
        }
        if filtered or realism:
            made = _filter_head(len(tokenizer), tokenizer.pad_token_id, channels, vae, realism)
            kwargs = {"filter_head": made, **kwargs}
        pipe = MinimPipeline(**{**components, **kwargs})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def _filter_head(vocab_size: int, pad_token_id: int, channels: int, vae, realism: bool):
    """A filter head in miniature whose ratings differ well from image to image."""
    import torch

    from minim_pipeline.minim_filter import FilterHead

    torch.manual_seed(1)
    head = FilterHead(
        in_channels=channels,
        sample_size=8,
        latent_scale=vae.config.scaling_factor,
        vocab_size=vocab_size,
        pad_token_id=pad_token_id,
        block_out_channels=(8, 8),
        layers_per_block=1,
        text_width=8,
        feature_size=8,
        norm_num_groups=4,
        calibration={name: {"score": 1.0, "finding": 1.0} for name in MODALITIES},
        enough=(3.0, 3.0),
        guidance_weight=0.0,
        rates_realism=realism,
        realism_weight=0.0,
    )
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return head.eval()


@pytest.fixture(scope="module")
def shared_pipeline(make_pipeline):
    """One pipeline for the tests of a module, which leave it as they found it."""
    return make_pipeline()


@pytest.fixture
def pipeline(make_pipeline):
    """A pipeline of the test's own, to change at will."""
    return make_pipeline()


@pytest.fixture(scope="session")
def pipeline_dir(make_pipeline, tmp_path_factory) -> Path:
    """A folder with a saved tiny pipeline in fp32, to read from."""
    folder = tmp_path_factory.mktemp("saved") / "minim-tiny"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """A tiny sentence encoder with random weights, which reads letters."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("sentences") / "teacher"
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-,.:;/"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return folder
