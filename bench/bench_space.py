"""How quick the Space is: seconds until it is ready, and from a rater's key to the next image on the screen.

Needs Debian's chromium and `pip install playwright`. Everything is measured in the browser but the start.

    python bench/bench_space.py
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path


# From the key to the frame in which the next image, decoded, is on the screen.
RATE = """async (count) => {
    const times = [];
    for (let i = 0; i < count; i++) {
        const before = document.querySelector("#picture img"), start = performance.now();
        document.dispatchEvent(new KeyboardEvent("keydown", {key: "123"[i % 3]}));
        while (document.querySelector("#picture img") === before) await new Promise(requestAnimationFrame);
        await document.querySelector("#picture img").decode();
        await new Promise(requestAnimationFrame);
        times.push(performance.now() - start);
        await new Promise((done) => setTimeout(done, 300));  // nobody rates quicker
    }
    return times;
}"""


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", type=int, default=30, help="How many images are rated; 40 come with the Space.")
    parser.add_argument("--port", type=int, default=7899)
    args = parser.parse_args(argv)
    from playwright.sync_api import sync_playwright

    app, url = Path(__file__).parent.parent / "space" / "app.py", f"http://127.0.0.1:{args.port}"
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page, start = browser.new_page(), time.monotonic()
        command = [sys.executable, str(app), "--port", str(args.port), "--store", f"{folder}/ratings.sqlite"]
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
            times = page.evaluate(RATE, args.ratings)
        finally:
            server.kill()
            browser.close()
    result = {
        "seconds until the page is ready": round(ready, 1),
        "milliseconds from a key to the next image": {
            "median": round(statistics.median(times)),
            "slowest": round(max(times)),
            "n": len(times),
        },
    }
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
