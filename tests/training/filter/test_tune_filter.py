"""A filter head is trained on with ratings by a script of its own."""

import pytest
import torch
import tune_filter
from conftest import write_csv
from PIL import Image

from minim_pipeline import FilterHead
from minim_pipeline.files import read_report
from minim_pipeline.locking import locked


@pytest.fixture
def call(make_pipeline, tmp_path):
    make_pipeline(filtered=True).save_pretrained(tmp_path / "model")
    rows, generator = [], torch.Generator().manual_seed(0)
    for i in range(12):
        image = (torch.rand(64, 64, 3, generator=generator) * 255).byte().numpy()
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        rows.append(dict(path=f"{i}.png", Text="cyst", modality="oct", rating=1 + i % 3, rater="ab"[i % 2]))
    ratings = write_csv(tmp_path / "ratings.csv", rows)
    sizes = ["--tuning_steps", "2", "--tuning_batch_size", "4", "--output_dir", str(tmp_path / "out")]
    return ["--pretrained_model_name_or_path", str(tmp_path / "model"), "--ratings", str(ratings), *sizes]


def test_the_head_and_what_it_is_worth_are_written(call, tmp_path):
    report = tune_filter.main(call)
    assert (report["n"], report["images"], report["kept_out"]) == (12, 12, 2) and set(report["raters"]) == {"a", "b"}
    assert report["taken"] == (report["after"]["log_loss"] < report["before"]["log_loss"])
    assert read_report(tmp_path / "out" / "report.json") == report
    assert FilterHead.from_pretrained(tmp_path / "out" / "filter_head").config.calibration


def test_a_pipeline_without_a_head_and_a_folder_in_use_are_refused(call, make_pipeline, tmp_path):
    with locked(tmp_path / "out"), pytest.raises(ValueError, match="another run is writing to"):
        tune_filter.main(call)
    make_pipeline().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has no filter head: train_filter.py makes one"):
        tune_filter.main(call)
    assert not (tmp_path / "out").exists(), "nothing is left behind"
