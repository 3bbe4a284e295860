"""How quick the Space is: seconds until it is ready, and from a rater's key to the next image on the screen.

Needs Debian's chromium and `pip install playwright`. Everything is measured in the browser but the start.

    python bench/bench_space.py
    python bench/bench_space.py --images 20000 --ratings 200
"""

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path


RATE = Path(__file__).with_name("rate.js")


def copy_images(source: Path, target: Path, count: int) -> None:
    """A folder of `count` images, copies of those of `source`, with data.csv."""
    target.mkdir()
    with open(source / "data.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(target / "data.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for i in range(count):
            row = rows[i % len(rows)]
            shutil.copyfile(source / row["path"], target / f"{i:05d}.png")
            writer.writerow(row | {"path": f"{i:05d}.png"})


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", type=int, default=30, help="How many images are rated, each after zooming in.")
    parser.add_argument("--images", type=int, default=36, help="How many images there are: copies of the Space's own.")
    parser.add_argument("--port", type=int, default=7899)
    args = parser.parse_args(argv)
    from playwright.sync_api import sync_playwright

    app, url = Path(__file__).parent.parent / "space" / "app.py", f"http://127.0.0.1:{args.port}"
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        copy_images(app.parent / "images", Path(folder) / "images", args.images)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page, start = browser.new_page(), time.monotonic()
        command = [sys.executable, str(app), "--port", str(args.port), "--store", f"{folder}/ratings.sqlite"]
        command += ["--images", f"{folder}/images"]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while time.monotonic() - start < 120:
                try:
                    urllib.request.urlopen(url + "/healthz")
                    break
                except OSError:
                    time.sleep(0.05)
            page.goto(url)
            page.get_by_role("button", name="Generate", exact=True).wait_for()
            ready = time.monotonic() - start
            page.goto(url + "/rate")
            page.get_by_label("Your name").fill("bench")
            page.keyboard.press("Enter")
            page.wait_for_selector("#picture img")
            page.wait_for_timeout(1000)
            times = page.evaluate(RATE.read_text(encoding="utf-8"), args.ratings)
        finally:
            server.kill()
            browser.close()
    answers = {"median": round(statistics.median(times)), "slowest": round(max(times)), "n": len(times)}
    result = {"seconds until the page is ready": round(ready, 1), "milliseconds from a key to the next image": answers}
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
