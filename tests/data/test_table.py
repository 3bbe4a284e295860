"""CSV files as people have them: foreign paths, no modality, unquoted commas, and files that are no CSV."""

import pytest
from PIL import Image

from minim_pipeline.data.sources import read_dataset, resolve_path


@pytest.fixture
def images(tmp_path):
    """Two images of the same name in folders of their own."""
    for folder in ("oct", "fundus"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        Image.new("L", (8, 8), 100).save(tmp_path / "images" / folder / "0.png")
    return tmp_path / "images"


def write(folder, text):
    path = folder / "data.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("caption", ["nan", "NaN", "None", "N/A", "null", "-", "OCT: nan", '"nan"'])
@pytest.mark.parametrize("header", ["path,Text,modality", "path,Text,modality,split", "image_path,prompt,modal"])
def test_a_missing_caption_is_a_bad_row(tmp_path, caption, header):
    path = write(tmp_path, f"{header}\na.png,{caption},OCT{',train' * ('split' in header)}\n")
    with pytest.raises(ValueError, match=r"row 1 \(line 2\): '.*' is no caption"):
        read_dataset(path, check_images=False)


def test_unquoted_commas_of_minims_example_are_the_caption_s(tmp_path):
    text = "path,Text,modal\n0.jpg,The heart, lungs,and  vessels: 1,5 cm.,CXR\n1.jpg,Clear, CXR\n2.jpg,A mass,x,PET\n"
    with pytest.raises(ValueError, match=r"1 bad row:\n  row 3 \(line 4\): 4 fields, .*an unquoted comma"):
        read_dataset(write(tmp_path, text), check_images=False)
    path = write(tmp_path, text.replace("PET", "BrainMRI"))
    with pytest.warns(UserWarning, match="in 2 of 3 rows.*row 1: 'The heart, lungs,and  vessels: 1,5 cm.'") as told:
        rows = read_dataset(path, check_images=False)
    assert len(told) == 1
    assert [row["Text"] for row in rows] == ["The heart, lungs,and  vessels: 1,5 cm.", "Clear", "A mass,x"]
    assert [row["modality"] for row in rows] == ["CXR", "CXR", "BrainMRI"]


def test_without_a_modality_everything_behind_the_path_is_the_caption(tmp_path):
    path = write(tmp_path, "path,Text\n0.jpg,Drusen, left eye\n1.jpg,Edema\n")
    with pytest.raises(ValueError, match="lacks the column 'modality'; .*name it with --modality"):
        read_dataset(path, check_images=False)
    with pytest.warns(UserWarning, match="in 1 of 2 rows"):
        rows = read_dataset(path, check_images=False, modality="Fundus")
    assert rows[0] == {"path": "0.jpg", "Text": "Drusen, left eye", "modality": "Fundus"}
    with pytest.raises(ValueError, match="Unknown modality 'Funds'"):
        read_dataset(path, check_images=False, modality="Funds")


def test_one_modality_for_all_rows_fills_gaps_and_contradicts_none(tmp_path):
    path = write(tmp_path, "path,Text,modality\n0.jpg,Drusen,\n1.jpg,Edema,color fundus\n")
    assert [row["modality"] for row in read_dataset(path, check_images=False, modality="Fundus")] == [
        "Fundus",
        "color fundus",
    ]
    with pytest.raises(ValueError, match=r"row 2 \(line 3\): modality 'color fundus', but 'OCT' is asked"):
        read_dataset(path, check_images=False, modality="OCT")


def test_an_ambiguous_modality_is_that_of_the_caption_s_prefix(tmp_path):
    path = write(tmp_path, "path,Text,modality\n0.jpg,Chest CT: nodule,CT\n")
    assert read_dataset(path, check_images=False)[0]["modality"] == "Chest CT"
    with pytest.raises(ValueError, match="modality 'CT' is ambiguous"):
        read_dataset(write(tmp_path, "path,Text,modality\n0.jpg,Brain MRI: nodule,CT\n"), check_images=False)


@pytest.mark.parametrize(
    "written", ["/data2404/somebody/oct/0.png", "D:\\data\\oct\\0.png", "oct/0.png", "./oct/0.png", "x/oct/0.png"]
)
def test_images_of_another_machine_are_found_under_the_root(images, tmp_path, written):
    path = write(tmp_path, f"path,Text,modality\n{written},Edema,OCT\n")
    (row,) = read_dataset(path, image_root=images)
    assert row["path"] == "images/oct/0.png" and resolve_path(row, path).is_file()


def test_two_images_are_never_taken_from_one_file(images, tmp_path):
    path = write(tmp_path, "path,Text,modality\n/a/cxr/0.png,Edema,OCT\n/b/ct/0.png,Edema,OCT\n/b/ct/0.png,X,OCT\n")
    with pytest.raises(ValueError, match="2 bad rows:\n  row 2 .*'/b/ct/0.png' and '/a/cxr/0.png' are the same file"):
        read_dataset(path, image_root=images / "oct")


def test_a_thousand_bad_rows_give_twenty_and_a_count(tmp_path):
    rows = "".join(f"/data2404/{i}.png,Edema,OCT\n" for i in range(1000))
    with pytest.raises(ValueError) as error:
        read_dataset(write(tmp_path, "path,Text,modality\n" + rows))
    lines = str(error.value).splitlines()
    assert len(lines) == 23 and "1000 bad rows" in lines[0]
    assert "row 20" in lines[20] and lines[21] == "  … and 980 more" and "--image_root" in lines[22]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("path;Text;modality\n0.png;Edema;OCT\n", "has semicolons between its columns"),
        ("path\tText\tmodality\n0.png\tEdema\tOCT\n", "has tabs between its columns"),
        ("sep=;\npath;Text;modality\n", "begins with the line 'sep=;'"),
        ("path,Text,modality\n0.png,Edema,OCT\n".encode("utf-16"), "is UTF-16"),
        ("path,Text,modality\n0.png,Edema,OCT\n".encode("utf-16-be"), "is UTF-16"),
        (b"PK\x03\x04\x14\x00\x06\x00[Content_Types].xml", r"is an Excel or LibreOffice file \(.xlsx"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is an old Excel file"),
        ("path,Text,modality\n0.png,Ödem,OCT\n".encode("cp1252"), "is not UTF-8"),
        ("path,Text,modality\n0.png;Edema;OCT\n", r"1 fields, the header has 3 \(semicolons instead of commas"),
    ],
)
def test_files_that_are_no_csv_are_told_by_their_cause(tmp_path, content, cause):
    with pytest.raises(ValueError, match=cause) as error:
        read_dataset(write(tmp_path, content), check_images=False)
    assert "save it as 'CSV UTF-8'" in str(error.value) or "fields" in cause


def test_images_are_found_from_a_csv_behind_a_link(images, tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    write(tmp_path / "far" / "away", "path,Text,modality\n/a/oct/0.png,Edema,OCT\n")
    (tmp_path / "near").symlink_to(tmp_path / "far" / "away")
    (row,) = read_dataset(tmp_path / "near" / "data.csv", image_root=images)
    assert resolve_path(row, tmp_path / "near" / "data.csv").samefile(images / "oct" / "0.png")
