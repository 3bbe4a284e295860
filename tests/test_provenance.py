import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

from minim_pipeline.provenance import DIGITAL_SOURCE_TYPE, read_provenance, save_png


METADATA = {
    "model": "minim-256",
    "revision": "abc123",
    "modality": "oct",
    "prompt": 'Ödem <b> & "quotes" – left\x00eye',
    "seed": 2**63 - 1,
    "steps": 25,
    "guidance": 3.5,
    "scheduler": "DPMSolverMultistepScheduler",
    "negative_prompt": None,
}


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_what_is_saved_is_read(tmp_path, mode):
    image = Image.new(mode, (8, 8), 7)
    save_png(image, tmp_path / "a.png", METADATA)
    found = read_provenance(tmp_path / "a.png")
    expected = {name: value for name, value in METADATA.items() if value is not None}
    expected["prompt"] = expected["prompt"].replace("\x00", " ")
    assert {name: found[name] for name in expected} == expected
    assert found["synthetic"] is True
    assert found["software"] == "minim-pipeline" and found["version"]
    assert found["digital_source_type"] == DIGITAL_SOURCE_TYPE
    assert "negative_prompt" not in found
    with Image.open(tmp_path / "a.png") as reopened:
        assert reopened.tobytes() == image.tobytes()
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_the_xmp_packet_is_well_formed_and_says_trained_algorithmic_media(tmp_path):
    save_png(Image.new("L", (8, 8)), tmp_path / "a.png", METADATA)
    with Image.open(tmp_path / "a.png") as image:
        packet = image.text["XML:com.adobe.xmp"]
    assert packet.startswith('<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>')
    root = ElementTree.fromstring(packet)
    iptc = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
    assert root.find(f".//{iptc}DigitalSourceType").text == (
        "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    )
    assert root.find(f".//{iptc}AIPromptInformation").text == 'Ödem <b> & "quotes" – left eye'


def test_metadata_cannot_deny_that_it_is_synthetic(tmp_path):
    save_png(Image.new("L", (8, 8)), tmp_path / "a.png", {"synthetic": "false"})
    assert read_provenance(tmp_path / "a.png")["synthetic"] is True


def test_other_images_have_no_provenance(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    Image.new("L", (8, 8)).save(tmp_path / "a.jpg")
    assert read_provenance(tmp_path / "a.png") == {}
    assert read_provenance(tmp_path / "a.jpg") == {}
