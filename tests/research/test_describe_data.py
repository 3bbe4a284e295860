"""The images that a model learned from are counted by modality, split, finding and source."""

import describe_data
import pytest
from conftest import FINDINGS, write_csv

from minim_pipeline.files import read_report


def test_images_are_counted_and_other_modalities_left_out(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model")
    first, second, *_ = FINDINGS["oct"]
    rows = [("OCT", first, "train", "tvhl"), ("OCT", first, "val", "tvhl"), ("OCT", second, "train", "srf")]
    rows += [("BreastMRI", "malignant", "train", "breastdm")]
    columns = ("modality", "finding", "split", "source")
    write_csv(tmp_path / "data.csv", [dict(zip(columns, row)) | {"path": "a.png", "Text": "a"} for row in rows])
    files = [str(tmp_path / "data.csv"), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out.json")]
    report = describe_data.main(["--name", "mine", "--data", *files])
    assert report == read_report(tmp_path / "out.json")
    assert (report["name"], report["train"], report["val"], list(report["modalities"])) == ("mine", 2, 1, ["oct"])
    counted = report["modalities"]["oct"]
    assert counted["findings"] == {first: {"train": 1, "val": 1}, second: {"train": 1, "val": 0}}
    assert counted["sources"] == {"srf": 1, "tvhl": 2}
    write_csv(tmp_path / "data.csv", [dict(zip(columns, rows[-1])) | {"path": "a.png", "Text": "a"}])
    with pytest.raises(ValueError, match="data.csv have no images of .*model: .*oct"):
        describe_data.main(["--name", "mine", "--data", *files])
