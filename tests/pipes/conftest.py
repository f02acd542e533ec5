import pytest

from tests.pipes.tiny import tiny_text_to_image_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_text_to_image_pipeline()


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with the tiny pipeline; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_text_to_image_pipeline().save_pretrained(folder)
    return folder
