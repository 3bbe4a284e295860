import json

import pytest
from PIL import Image

from minim_pipeline.data.sources import DatasetWriter, read_dataset, resolve_path


@pytest.fixture
def folder(tmp_path):
    """Three images, two of them in a sub-folder."""
    (tmp_path / "images").mkdir()
    for name in ("a.png", "images/b.png", "images/c.png"):
        Image.new("L", (8, 8), 100).save(tmp_path / name)
    return tmp_path


def write(folder, text, encoding="utf-8"):
    path = folder / "data.csv"
    path.write_text(text, encoding=encoding)
    return path


def test_reads_minims_format_with_extra_columns(folder):
    text = 'path,Text,modality,finding\na.png,"Edema, left eye",OCT,edema\nimages/b.png,A lung,ChestCT,\n'
    path = write(folder, text)
    rows = read_dataset(path)
    assert rows[0] == {"path": "a.png", "Text": "Edema, left eye", "modality": "OCT", "finding": "edema"}
    assert rows[1]["finding"] == ""
    assert resolve_path(rows[1], path) == folder / "images/b.png"


def test_modal_spaces_byte_order_mark_blank_lines_and_crlf(folder):
    text = ' path , Text ,modal \r\n\r\n a.png , "Edema, left eye" , OCT \r\n'
    path = write(folder, text, encoding="utf-8-sig")
    assert read_dataset(path) == [{"path": "a.png", "Text": "Edema, left eye", "modality": "OCT"}]


def test_modal_is_carried_through_beside_modality(folder):
    path = write(folder, "path,Text,modal,modality\na.png,Edema,x,OCT\n")
    assert read_dataset(path) == [{"path": "a.png", "Text": "Edema", "modal": "x", "modality": "OCT"}]


def test_missing_columns_are_named_with_those_found(folder):
    path = write(folder, "path,caption,split\na.png,Edema,train\n")
    with pytest.raises(ValueError, match="lacks the columns 'Text', 'modality'; found: 'path', 'caption', 'split'"):
        read_dataset(path)
    with pytest.raises(ValueError, match="lacks the column 'split'"):
        read_dataset(write(folder, "path,Text,modality\na.png,Edema,OCT\n"), split="train")


def test_every_bad_row_is_listed_with_row_and_line(folder):
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:50])
    path = write(
        folder,
        "path,Text,modality,finding\n"
        "a.png,Edema, left eye,OCT,\n"  # row 1: an unquoted comma
        '\nimages/b.png,"two\nlines",OCT,\n'  # row 2 is fine, and takes lines 4 and 5
        "gone.png,Edema,OCT,\n"
        "broken.png,Edema,OCT,\n"
        "a.png,,OCT,\n"
        "a.png,Edema,MRI,\n"
        "a.png,Edema,PET,\n"
        "a.png\n",
    )
    with pytest.raises(ValueError) as error:
        read_dataset(path)
    text = str(error.value)
    assert "7 bad rows" in text
    assert "row 1 (line 2): 5 fields, the header has 4 (an unquoted comma? 'a.png,Edema,left eye,OCT,')" in text
    assert f"row 3 (line 6): no image {folder / 'gone.png'}" in text
    assert f"row 4 (line 7): broken image {folder / 'broken.png'}" in text
    assert "row 5 (line 8): no value for 'Text'" in text
    assert "row 6 (line 9): modality 'MRI' is ambiguous" in text
    assert "row 7 (line 10): Unknown modality 'PET'" in text
    assert "row 8 (line 11): 1 fields" in text

    with pytest.warns(UserWarning, match=r"Left out(.|\n)*gone.png"):
        rows = read_dataset(path, skip_bad_rows=True)
    assert [row["path"] for row in rows] == ["images/b.png"]


def test_images_of_other_splits_and_unchecked_ones_may_be_missing(folder):
    path = write(folder, "path,Text,modality,split\na.png,Edema,OCT,train\ngone.png,Edema,OCT,val\n")
    assert len(read_dataset(path, split="train")) == 1
    assert len(read_dataset(path, check_images=False)) == 2
    with pytest.raises(ValueError, match="no usable rows of split 'test'; splits found: 'train', 'val'"):
        read_dataset(path, split="test")


def test_image_root(folder):
    path = write(folder, "path,Text,modality\nb.png,Edema,OCT\n")
    with pytest.raises(ValueError, match="no image"):
        read_dataset(path)
    assert len(read_dataset(path, image_root=folder / "images")) == 1


def test_prompt_lists_need_no_path(folder):
    path = write(folder, "Text,modality\nEdema,OCT\n")
    assert read_dataset(path, require=("Text", "modality"), check_images=False) == [
        {"Text": "Edema", "modality": "OCT"}
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"path,Text,modality\n", "no usable rows"),
        (b"path,Text,modality\na.png,\xe4dem,OCT\n", "is not UTF-8"),
        (b"path,Text,Text\n", "same name: 'Text'"),
    ],
)
def test_files_that_are_no_data_sets(folder, content, message):
    path = folder / "data.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_dataset(path, require=("path",), check_images=False)


def add(writer, index, **row):
    image = Image.new("RGB", (8, 8), (index, index, index))
    writer.add(index, image, {"Text": f"text, {index}", "modality": "OCT", "seed": index, **row}, {"seed": index})


def test_what_is_written_can_be_read(tmp_path):
    writer = DatasetWriter(tmp_path / "out", ["finding"], {"steps": 5})
    assert not (tmp_path / "out").exists()
    add(writer, 1, finding="edema")
    add(writer, 0)
    writer.finish()
    assert read_dataset(tmp_path / "out/data.csv") == [
        {"path": "0000.png", "Text": "text, 0", "modality": "OCT", "seed": "0", "finding": ""},
        {"path": "0001.png", "Text": "text, 1", "modality": "OCT", "seed": "1", "finding": "edema"},
    ]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "0000.png", "0001.png", "data.csv", "metadata.csv", "run.json"
    ]  # fmt: skip


def test_goes_on_after_half_a_row_and_a_lost_image(tmp_path):
    writer = DatasetWriter(tmp_path)
    for index in range(3):
        add(writer, index)
    (tmp_path / "0001.png").unlink()
    text = (tmp_path / "data.csv").read_text()
    (tmp_path / "data.csv").write_text(text + '0003.png,"text')  # as a crash of the machine may leave it

    writer = DatasetWriter(tmp_path)
    assert sorted(writer.rows) == ["0000.png", "0002.png"]
    add(writer, 1)
    assert len(read_dataset(tmp_path / "data.csv")) == 3
    writer.finish()
    assert [row["seed"] for row in read_dataset(tmp_path / "data.csv")] == ["0", "1", "2"]


def test_a_failing_write_leaves_nothing(tmp_path):
    class Broken(Image.Image):
        def save(self, file, **kwargs):
            with open(file, "wb") as handle:
                handle.write(b"half")
            raise KeyboardInterrupt

    writer = DatasetWriter(tmp_path)
    add(writer, 0)
    with pytest.raises(KeyboardInterrupt):
        writer.add(1, Broken(), {}, {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0000.png", "data.csv", "run.json"]
    assert len(read_dataset(tmp_path / "data.csv")) == 1


def test_other_settings_are_named(tmp_path):
    add(DatasetWriter(tmp_path, settings={"model": "m", "steps": 5, "size": (256, 256)}), 0)
    assert len(DatasetWriter(tmp_path, settings={"model": "m", "steps": 5, "size": (256, 256)}).rows) == 1
    with pytest.raises(ValueError, match=r"other settings \(steps: 5 there, 9 now; lora: None there, 'x' now\)"):
        DatasetWriter(tmp_path, settings={"model": "m", "steps": 9, "size": [256, 256], "lora": "x"})


def test_a_foreign_data_csv_is_not_touched(folder):
    write(folder, "path,Text,modality\na.png,Edema,OCT\n")
    with pytest.raises(ValueError, match="no run has written"):
        DatasetWriter(folder)
    for inside in ("a.png", "a.png/out"):
        with pytest.raises(ValueError, match="a.png is a file"):
            DatasetWriter(folder / inside)


def test_an_open_quote_is_told_without_the_rest_of_the_file(folder):
    path = write(folder, 'path,Text,modality\na.png,"Edema,OCT\n' + "a.png,Edema,OCT\n" * 100)
    with pytest.raises(ValueError, match=r"row 1 \(line 2\): 2 fields.*an open quote") as caught:
        read_dataset(path)
    assert len(str(caught.value)) < 400


def test_goes_on_after_a_spreadsheet_has_saved_the_table(tmp_path):
    add(DatasetWriter(tmp_path, ["note"]), 0, Text="a\r\nb")
    saved = (tmp_path / "data.csv").read_bytes().decode()
    (tmp_path / "data.csv").write_text("\ufeff" + saved, encoding="utf-8", newline="")
    assert DatasetWriter(tmp_path, ["note"]).rows["0000.png"]["Text"] == "a\r\nb"
    (tmp_path / "data.csv").write_text("file,caption\n0000.png,x\n")
    with pytest.raises(ValueError, match="data.csv lacks the columns 'path', 'Text'"):
        DatasetWriter(tmp_path)


def test_processes_write_parts_that_one_of_them_merges(tmp_path):
    writers = [DatasetWriter(tmp_path, part=part) for part in range(2)]
    for index in range(4):
        add(writers[index % 2], index)
    assert not (tmp_path / "data.csv").exists()
    assert len(DatasetWriter(tmp_path).rows) == 4  # stopped here, one process would go on
    writers[0].finish()
    assert [row["path"] for row in read_dataset(tmp_path / "data.csv")] == [f"{index:04d}.png" for index in range(4)]
    assert not list(tmp_path.glob("data-*"))
    assert json.loads((tmp_path / "run.json").read_text()) == {}
