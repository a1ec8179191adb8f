"""JupyterLab as its users have it: a notebook of each folder opened in Chromium, run from the menu, looked at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import browser_helpers
import pytest
from conftest import REPOSITORY

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
pytestmark = pytest.mark.skipif(bool(browser_helpers.lacking()), reason=browser_helpers.lacking())

SHORT = (
    "yaras2024/03_svd_evolution",
    "kwon2024/06_sensing",
    "balzano2025/03_regularised_factorization",
    "beyond/02_rank_bound",
)
SECONDS = 180  # for anything to happen, on a busy machine
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells off the screen are on the page, too
}


@dataclass
class Lab:
    """A server on loopback over copies of notebooks without outputs."""

    address: str
    folder: Path

    def asked(self, place: str) -> Any:
        with urlopen(f"{self.address}/api/{place}", timeout=30) as answer:
            return json.load(answer)

    def add(self, id: str) -> str:
        content = json.loads((REPOSITORY / "notebooks" / f"{id}.ipynb").read_text())
        for cell in content["cells"]:
            if cell["cell_type"] == "code":
                cell |= {"outputs": [], "execution_count": None}
        copy = self.folder / f"{id}.ipynb"
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(json.dumps(content))
        return f"{id}.ipynb"

    def cells(self, name: str) -> list[dict[str, Any]]:
        """The code cells as they were saved last."""
        found = self.asked(f"contents/{name}?content=1")["content"]["cells"]
        return [cell for cell in found if cell["cell_type"] == "code"]

    def kernel_is_ready(self, name: str) -> bool:
        kernels = [each["kernel"] for each in self.asked("sessions") if each["path"] == name]
        return any(kernel["execution_state"] == "idle" and kernel["connections"] > 0 for kernel in kernels)


def wait(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {SECONDS} s"
        time.sleep(0.5)


def places(folder: Path) -> dict[str, str]:
    """An environment in which Jupyter reads and writes nothing of the user's."""
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
             "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR", "COMPRESSIBLE_FIGURES")  # fmt: skip
    own = {name: str(folder / name.lower()) for name in names}
    for name, content in SETTINGS.items():
        file = Path(own["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    searched = os.pathsep.join(filter(None, [str(REPOSITORY / "lib"), os.environ.get("PYTHONPATH")]))
    return os.environ | own | {"PYTHONPATH": searched, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    served, environment = folder / "notebooks", places(folder)
    served.mkdir()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root",
               "--IdentityProvider.token=", f"--ServerApp.root_dir={served}",
               "--LabApp.expose_app_in_browser=True"]  # fmt: skip
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield Lab(_address(Path(environment["JUPYTER_RUNTIME_DIR"]), server, folder / "log"), served)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def _address(runtime: Path, server: subprocess.Popen, log: Path) -> str:
    """Where the server listens, as it writes once it does."""
    file = runtime / f"jpserver-{server.pid}.json"
    wait(lambda: file.exists() or server.poll() is not None, "JupyterLab's start")
    assert server.poll() is None, log.read_text()
    port = json.loads(file.read_text())["port"]
    assert port, log.read_text()
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser_helpers.browser() as started:
        yield started


def run_all(lab: Lab, page: Any, name: str) -> list[dict[str, Any]]:
    """Open a notebook, run all its cells by the menu, save it; its code cells."""
    page.goto(f"{lab.address}/lab/tree/{name}?reset")
    wait(lambda: lab.kernel_is_ready(name), "a kernel")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    def ended() -> bool:
        page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
        cells = lab.cells(name)
        failed = any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
        return failed or all(cell["execution_count"] for cell in cells)

    wait(ended, f"the end of {name}")
    return lab.cells(name)


@pytest.mark.parametrize("id", SHORT)
def test_a_notebook_runs_from_the_menu_and_shows_its_figure(id: str, lab: Lab, chromium: Any) -> None:
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    outputs = [output for cell in run_all(lab, page, lab.add(id)) for output in cell["outputs"]]
    assert [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"] == []
    assert any("image/png" in output.get("data", {}) for output in outputs)
    picture = page.locator(".jp-OutputArea-output img[src^='data:image/png']").first
    picture.scroll_into_view_if_needed()
    assert picture.evaluate("(image) => image.naturalWidth") > 300
    assert page.locator(".jp-OutputArea-output[data-mime-type*='error'], .jp-Dialog").count() == 0
    assert troubles == []
    page.close()


def test_the_slider_of_the_explorer_moves_the_picture(lab: Lab, chromium: Any) -> None:
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    run_all(lab, page, lab.add(SHORT[0]))
    slider, image = page.locator(".jupyter-widgets .noUi-handle"), page.locator(".jupyter-widgets.widget-image")
    image.scroll_into_view_if_needed()
    before, told = image.get_attribute("src"), page.locator(".jupyter-widgets .widget-readout").inner_text()
    slider.focus()
    slider.press("ArrowRight")
    wait(lambda: image.get_attribute("src") != before, "another picture")
    assert int(page.locator(".jupyter-widgets .widget-readout").inner_text()) == int(told) + 1
    page.close()
