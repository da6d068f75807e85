"""A headless browser, driven by selenium; `make test-browser` installs both."""

import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver  # Of the extra `browser`, which other tests do without.
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}", "--window-size=1200,1600",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(str(shutil.which("chromedriver"))))
    yield driver
    driver.quit()


class Page:
    """A file opened in the browser."""

    def __init__(self, browser: Any, file: pathlib.Path) -> None:
        self.browser = browser
        browser.get(file.as_uri())

    def errors(self) -> list[str]:
        """What the console says."""
        return [entry["message"] for entry in self.browser.get_log("browser")]

    def count(self, selector: str) -> int:
        """Elements of a CSS selector."""
        return len(self.browser.find_elements("css selector", selector))

    def has_dialog(self) -> bool:
        """Whether a script has opened one."""
        from selenium.common.exceptions import NoAlertPresentException

        try:
            self.browser.switch_to.alert.dismiss()
        except NoAlertPresentException:
            return False
        return True


@pytest.fixture
def opened(browser: Any) -> Any:
    """Opens a file."""
    return lambda file: Page(browser, file)
