"""A Space on a Hub: its header, its requirements, and the code that it runs. tests/web starts one."""

import ast
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard

from hub.conftest import ROOT, Client
from hub.hub_server import HubServer
from lavit_hf import LavitVisualTokenizer
from lavit_hf.hub import PublishError, publish_space
from lavit_hf.hub.space import GRADIO, space_files

PUBLISH = "import sys\nfrom lavit_cli import main\nsys.argv = ['lavit', *sys.argv[1:]]\nmain()"


def test_model_and_space_are_published_by_one_command(hub: HubServer, client: Client, tiny_checkpoint: Path) -> None:
    command = ["publish", tiny_checkpoint, "owner/tiny", "--space", "owner/try-tiny"]
    listed = client(PUBLISH, *command, "--dry-run")
    assert "Would publish the Space owner/try-tiny: " in listed.stdout and not hub.repositories
    done = client(PUBLISH, *command)
    assert f"Published {hub.url}/spaces/owner/try-tiny" in done.stdout and "ZeroGPU" in done.stderr
    files = hub.files("spaces:owner/try-tiny")
    assert "config.json" in hub.files("owner/tiny") and "config.json" not in files

    card = SpaceCard(files["README.md"].decode()).data
    assert (card.sdk, card.sdk_version, card.app_file, card.models) == ("gradio", GRADIO, "app.py", ["owner/tiny"])
    assert len(card.short_description) <= 60  # the Hub refuses longer ones

    app = ast.parse(files["app.py"])
    (model,) = [
        node.value.value for node in app.body if isinstance(node, ast.Assign) and node.targets[0].id == "MODEL"
    ]
    assert model == "owner/tiny"
    names = [node.names[0].name for node in app.body if isinstance(node, ast.Import)]
    assert names == ["spaces"] and b"on_gpu=spaces.GPU" in files["app.py"]

    packages = [re.split(r"[<>=\[; ]", line)[0] for line in files["requirements.txt"].decode().splitlines()]
    assert {"torch", "transformers", "diffusers", "spaces", "huggingface_hub"} <= set(packages)
    assert not {"gradio", "pytest", "datasets", "uvicorn"} & set(packages)

    assert files["lavit_hf/__init__.py"] == (ROOT / "src/lavit_hf/__init__.py").read_bytes()
    assert "lavit_hf/processing/chat_template.jinja" in files and "lavit_hf/web/app.py" in files
    assert not [name for name in files if "checkpoints/" in name or "__pycache__" in name]

    client(PUBLISH, *command)  # again, when both are there
    assert hub.files("spaces:owner/try-tiny").keys() == files.keys()


def test_a_private_model_gets_no_public_space(hub: HubServer, client: Client, tiny_checkpoint: Path) -> None:
    command = ["publish", tiny_checkpoint, "owner/tiny", "--space", "owner/try-tiny"]
    client(PUBLISH, *command)
    before = hub.files("spaces:owner/try-tiny")
    code = "import sys\nfrom lavit_hf.hub import *\ntry:\n"
    code += "    publish_space('owner/try-tiny', 'owner/tiny', sys.argv[1], private=True)\n"
    code += "except PublishError as error:\n    print(error)"
    assert "owner/try-tiny exists and is public; make it private" in client(code, tiny_checkpoint).stdout
    assert hub.files("spaces:owner/try-tiny") == before


def test_who_may_not_write_is_told(hub: HubServer, client: Client, tiny_checkpoint: Path) -> None:
    code = "import sys\nfrom lavit_hf.hub import *\ntry:\n    publish_space('owner/page', 'owner/tiny', sys.argv[1])\n"
    code += "except PublishError as error:\n    print(error)"
    assert "The Space owner/page was not changed" in client(code, tiny_checkpoint, is_owner=False).stdout
    assert not hub.repositories


def test_what_no_page_can_show_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    LavitVisualTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tokenizer)
    with pytest.raises(PublishError, match="visual tokenizer alone"):
        publish_space("me/page", "me/model", tokenizer, dry_run=True)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(PublishError, match="merge them"):
        publish_space("me/page", "me/model", adapter, dry_run=True)
    for names in (("page", "me/model"), ("me/page", "../model"), ("a/b/c", "me/model")):
        with pytest.raises(PublishError, match="not the name of a repository"):
            publish_space(*names, tiny_checkpoint, dry_run=True)


def test_a_name_stays_a_text(tiny_checkpoint: Path) -> None:
    """Names come from a command line; nothing in one becomes code or metadata."""
    files = space_files("me/page", "me/a.b-c_d", tiny_checkpoint)
    assert b'\nMODEL = "me/a.b-c_d"\n' in files["app.py"]


def test_the_page_is_tested_with_the_gradio_of_spaces() -> None:
    assert f"gradio=={GRADIO}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
