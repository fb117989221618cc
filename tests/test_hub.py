"""Pushing to a Hub and loading from it, in processes of their own against a real server on loopback."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from hub_server import READ_TOKEN, TOKEN, LoopbackHub, Repo
from runs import save_teacher, tiny_tokenizer
from safetensors.torch import load_file, save_file
from teachers import tiny_teacher, tokens
from test_card import EVALUATION, SCORES, TOKENS
from test_standalone import BLOCK

import hf_hybrid as hh
from hf_hybrid.card import save_model
from hf_hybrid.run.recipe import Recipe


def save_run(folder: Path, model: Any) -> Path:
    """A finished run's folder, as far as a push reads it."""
    from runs import tiny_recipe

    folder.mkdir()
    Recipe.from_dict(tiny_recipe("teacher", "texts")).save(folder / "recipe.yaml")
    EVALUATION.save(folder / "evaluation.json")
    SCORES.save(folder / "scores.json")
    (folder / "report.json").write_text(json.dumps({"tokens": TOKENS, "hf_hybrid": "0.0.7"}))
    save_model(model, tiny_tokenizer(), folder / "model")
    return folder


def changed(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    return model


LOAD = """
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = load_file("ids.safetensors")["ids"]
for name, id, revision in CASES:
    model = AutoModelForCausalLM.from_pretrained(id, trust_remote_code=True, revision=revision)
    assert "hf_hybrid" not in type(model).__module__, type(model).__module__
    save_file({"logits": model(ids).logits.detach()}, f"{name}.safetensors")
    # It needs no code. Told neither yes nor no, the library would ask, because the config has some.
    tokenizer = AutoTokenizer.from_pretrained(id, revision=revision, trust_remote_code=name != "direct")
    print(tokenizer("def function_1(x, y)")["input_ids"])
"""


def test_push_and_load_back(hub: LoopbackHub, tmp_path: Path) -> None:
    teacher, ids = tiny_teacher("qwen3", vocab_size=300), tokens(2, 40)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    first = hh.convert(teacher, [1, 3])
    logits = [first(ids).logits]
    run = save_run(tmp_path / "run", first)
    (run / "model" / "optimizer.pt").write_bytes(b"no part of a model")
    second = changed(first)
    logits.append(second(ids).logits)
    second.save_pretrained(tmp_path / "second", max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(tmp_path / "second")
    hub.repos["tester/written"] = Repo()
    hub.repos["tester/written"].commit("main", {"README.md": b"# In my own words\n"}, "first")
    out = hub.run(
        tmp_path,
        """
        import json
        from hf_hybrid.cli import main
        assert main(["push", "run", "tester/mine", "--private", "--commit-message", "A first hybrid", "--json"]) == 0
        assert main(["push", "second", "tester/mine", "--revision", "try", "--json"]) == 0
        assert main(["push", "second", "tester/mine"]) == 0
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model, tokenizer = (k.from_pretrained("run/model") for k in (AutoModelForCausalLM, AutoTokenizer))
        url = model.push_to_hub("tester/direct", tokenizer=tokenizer, commit_message="Straight from the model")
        model.push_to_hub("tester/written")
        model.push_to_hub("tester/direct")
        model.save_pretrained("saved", push_to_hub=True, repo_id="tester/saved")
        """,
    )
    decoder = json.JSONDecoder()
    pushed, end = decoder.raw_decode(out)
    tried, end = decoder.raw_decode(out, end + 1)
    repo = hub.repos["tester/mine"]
    assert repo.private and repo.messages[pushed["commit"]] == "A first hybrid"
    assert (
        pushed["left_out"] == ["optimizer.pt"] and pushed["url"] == f"{hub.url}/tester/mine/commit/{pushed['commit']}"
    )
    assert pushed["files"] == {
        name: len(data) for name, data in repo.trees[pushed["commit"]].items() if name[0] != "."
    }
    assert repo.branches["try"] == [pushed["commit"], tried["commit"]] and len(repo.branches["main"]) == 3
    # The weights of the second are in shards: the file of the first would be loaded in their place.
    assert tried["removed"] == ["model.safetensors", "scores.png"]
    assert "model.safetensors" not in repo.trees[repo.resolve("main")]
    assert repo.trees[pushed["commit"]]["scores.png"].startswith(b"\x89PNG")
    card = repo.trees[pushed["commit"]]["README.md"].decode()
    assert 'path = "tester/mine"' in card and "0.1235 ± 0.0068" in card and "22,222 tokens" in card

    direct = hub.repos["tester/direct"]
    # One commit of all; the second push found nothing new, the card included.
    assert list(direct.messages.values()) == ["initial commit", "Straight from the model"]
    for name in ("direct", "saved"):
        repo = hub.repos[f"tester/{name}"]
        card = repo.trees[repo.resolve("main")]["README.md"].decode()
        assert f'path = "tester/{name}"' in card and "gated-deltanet" in card and "0.1235" not in card
        assert "automatically generated" not in card
    written = hub.repos["tester/written"]
    tree = written.trees[written.resolve("main")]
    assert "model.safetensors" in tree and tree["README.md"].endswith(b"# In my own words\n")

    cases = [
        ("pinned", "tester/mine", pushed["commit"]),
        ("branch", "tester/mine", "try"),
        ("main", "tester/mine", "main"),
        ("direct", "tester/direct", None),
    ]
    there = tmp_path / "home"
    there.mkdir()
    code, env = f"{BLOCK}CASES = {cases}\n{LOAD}", hub.environment(there) | {"PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == [str(tiny_tokenizer()("def function_1(x, y)")["input_ids"])] * 4
    for name, expected in (("pinned", 0), ("branch", 1), ("main", 1), ("direct", 0)):
        assert torch.equal(load_file(tmp_path / f"{name}.safetensors")["logits"], logits[expected]), name


def test_a_teacher_from_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    """Conversion by name and revision, where the hybrid's card then leads back to the teacher."""
    save_teacher(tmp_path / "teacher")
    (tmp_path / "teacher" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n"
    )
    hub.run(
        tmp_path,
        """
        import os, torch
        from pathlib import Path
        os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # as the command line does
        from huggingface_hub import CommitOperationAdd, HfApi, model_info
        from transformers import AutoModelForCausalLM, AutoTokenizer
        HfApi().create_repo("tester/teacher")
        files = [CommitOperationAdd(path.name, path) for path in Path("teacher").iterdir()]
        HfApi().create_commit("tester/teacher", files, commit_message="old")
        old = model_info("tester/teacher").sha
        teacher, tokenizer = (k.from_pretrained("teacher") for k in (AutoModelForCausalLM, AutoTokenizer))
        before = teacher.lm_head.weight.clone()
        torch.nn.init.ones_(teacher.lm_head.weight)
        teacher.push_to_hub("tester/teacher")

        import hf_hybrid as hh
        from hf_hybrid.cli import main
        from hf_hybrid.teacher.loading import load_model, load_pair
        new = model_info("tester/teacher").sha
        for revision, commit, weight in ((None, new, teacher.lm_head.weight), (old, old, before), ("main", new, None)):
            hybrid = hh.convert("tester/teacher", [1], revision=revision)
            assert hybrid.config.teacher_name_or_path == "tester/teacher"
            assert hybrid.config.teacher_revision == commit, (hybrid.config.teacher_revision, commit)
            assert weight is None or torch.equal(hybrid.lm_head.weight, weight)
            loaded, _ = load_pair("tester/teacher", revision=revision)
            assert torch.equal(loaded.lm_head.weight, hybrid.lm_head.weight)
        options = ["--full-attention-layers", "1,2", "--output", "hybrid", "--revision", old]
        assert main(["convert", "tester/teacher", *options]) == 0
        assert main(["push", "hybrid", "tester/hybrid"]) == 0
        hybrid = load_model("tester/hybrid")
        assert hybrid.config.teacher_revision == old and torch.equal(hybrid.lm_head.weight, before)
        hybrid.push_to_hub("tester/child")
        load_model("hybrid").push_to_hub("tester/sibling")
        Path("pytorch_model.bin").write_bytes(b"never opened")
        HfApi().create_repo("tester/pickles")
        sources = {"config.json": "teacher/config.json", "pytorch_model.bin": "pytorch_model.bin"}
        files = [CommitOperationAdd(name, path) for name, path in sources.items()]
        HfApi().create_commit("tester/pickles", files, commit_message="old")
        for name, revision, message in (
            ("tester/teacher", "0" * 40, "no such revision"),
            ("tester/nothing", None, "was found neither as a folder nor as a model on the Hub"),
            ("tester/pickles", None, "has no safetensors weights"),
        ):
            try:
                load_pair(name, revision=revision)
            except ValueError as error:
                assert message in str(error), error
            else:
                raise SystemExit(message)
        """,
    )
    bases = {}
    for name in ("hybrid", "child", "sibling"):
        repo = hub.repos[f"tester/{name}"]
        data = yaml.safe_load(repo.trees[repo.resolve("main")]["README.md"].decode().split("---")[1])
        assert data["base_model_relation"] == "finetune"
        bases[name] = data["base_model"]
        if name != "child":
            old = hub.repos["tester/teacher"].branches["main"][1]
            assert (data["license"], data["license_name"]) == ("other", "own")
            assert data["license_link"] == f"https://huggingface.co/tester/teacher/blob/{old}/LICENSE"
    assert bases == {"hybrid": "tester/teacher", "child": "tester/hybrid", "sibling": "tester/teacher"}


PUSH = """
import os, sys
import huggingface_hub.utils._http as http
http.time.sleep = lambda seconds: None  # the client waits longer and longer before it gives up
from hf_hybrid.cli import main
sys.stderr = sys.stdout
for token, *arguments in CASES:
    os.environ["HF_TOKEN"] = token
    assert main(["push", "model", *arguments]) == 2
"""


def sentences(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("hf-hybrid: ")]


def test_errors_of_the_hub_are_sentences(hub: LoopbackHub, tmp_path: Path) -> None:
    model = hh.convert(tiny_teacher("qwen3", vocab_size=300), [1, 3])
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    hub.repos["tester/public"] = Repo()
    hub.repos["tester/public"].commit("main", {"README.md": b"# Here before\n"}, "first")
    before = {name: list(repo.trees) for name, repo in hub.repos.items()}
    cases = {
        ("hf_wrong", "tester/other"): "your token is missing or wrong; log in with `hf auth login`",
        (READ_TOKEN, "tester/other"): "your token may not write there",
        (TOKEN, "somebody/else"): "your token may not write there",
        (TOKEN, "not a name"): "'not a name'",
        (TOKEN, "tester/public", "--private"): "tester/public exists and is public",
    }
    out = hub.run(tmp_path, f"CASES = {list(cases)}\n{PUSH}")
    for sentence, text in zip(sentences(out), cases.values(), strict=True):
        assert text in sentence
        assert text.startswith("'") or "public" in text or sentence.startswith("hf-hybrid: nothing was pushed to ")
    assert "Traceback" not in out and {name: list(repo.trees) for name, repo in hub.repos.items()} == before


def test_a_server_that_dies_leaves_nothing_half_pushed(hub: LoopbackHub, tmp_path: Path) -> None:
    model = hh.convert(tiny_teacher("qwen3", vocab_size=300), [1, 3])
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    for dies_at in ("upload", "commit"):
        hub.dies_at, hub.dead = dies_at, False
        out = hub.run(tmp_path, f"CASES = {[(TOKEN, 'tester/mine')]}\n{PUSH}")
        [sentence] = sentences(out)
        assert "nothing was pushed to tester/mine" in sentence and "push again" in sentence, out
        assert "Traceback" not in out
        repo = hub.repos["tester/mine"]
        assert len(repo.trees) == 1 and list(repo.trees[repo.resolve("main")]) == [".gitattributes"]
    hub.dies_at, hub.dead = None, False
    hub.run(tmp_path, "from hf_hybrid.cli import main\nassert main(['push', 'model', 'tester/mine']) == 0")
    assert "model.safetensors" in repo.trees[repo.resolve("main")]


def test_push_to_hub_sends_no_path_and_removes_nothing(hub: LoopbackHub, tmp_path: Path) -> None:
    """The second is the library's way, and why the page sends whoever changes the shards to `hf-hybrid push`."""
    save_teacher(tmp_path / "secret" / "teacher")
    hybrid = hh.convert(tmp_path / "secret" / "teacher", [1])
    hybrid.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved").iterdir():
        assert b"secret" not in path.read_bytes(), path.name
    hub.run(
        tmp_path,
        """
        import os, hf_hybrid as hh
        hybrid = hh.convert(os.path.abspath("secret/teacher"), [1])
        hybrid.push_to_hub("tester/plain")
        hybrid.push_to_hub("tester/plain", max_shard_size="100KB")
        """,
    )
    repo = hub.repos["tester/plain"]
    tree = repo.trees[repo.resolve("main")]
    assert json.loads(tree["config.json"])["teacher_name_or_path"] == "teacher"
    assert not [name for name, data in tree.items() if b"secret" in data or bytes(tmp_path) in data]
    assert {"model.safetensors", "model.safetensors.index.json"} <= tree.keys()


def test_the_snippets_of_the_page_run_as_printed(hub: LoopbackHub, tmp_path: Path) -> None:
    """One after the other, with a branch of the name that stands for a commit."""
    page = Path(__file__).parents[1] / "docs" / "hub.md"
    push, load, again = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.S)
    hub.repos["me/my-hybrid"] = Repo()
    hub.repos["me/my-hybrid"].commit("main", {".gitattributes": b""}, "initial commit")
    hybrid = hh.convert(tiny_teacher(), [1, 3])
    hybrid.save_pretrained(tmp_path / "old")
    tiny_tokenizer().save_pretrained(tmp_path / "old")
    said = hub.run(
        tmp_path,
        "\n".join(
            [
                "import torch, transformers",
                "from huggingface_hub import HfApi",
                "import hf_hybrid as hh",
                "model = hh.HybridForCausalLM.from_pretrained('old')",
                "tokenizer = transformers.AutoTokenizer.from_pretrained('old')",
                push,
                "HfApi().create_branch('me/my-hybrid', branch='COMMIT')",
                "first = model",
                load,
                "ids = torch.arange(5, 25)[None]",
                "assert torch.equal(model(ids).logits, first(ids).logits)",
                "assert tokenizer('a b')['input_ids']",
                again,
                "print(type(hh.HybridForCausalLM.from_pretrained('new')).__name__)",
            ]
        ),
    )
    assert said.splitlines()[-1] == "HybridForCausalLM"
