"""docs/library.md, block by block, as a user would run it."""

import os
import re
import subprocess
import sys
import textwrap

import pytest
import scored_model
from conftest import ROOT

BEGIN = "import torch\nimport torch.distributed as dist\ndist.init_process_group('gloo', {group})\n"
# What the page says of the results of each part.
CHECKS = {
    "A trained model": """
assert similarity.shape == (24, 2) and not undecodable
assert (images.norm(dim=1) - 1).abs().max() < 1e-6
ours = texts
""",
    "The same model": """
theirs = CLIPModel.from_pretrained("exported/hugging_face").get_text_features(
    **processor(text=["a cat", "two dogs"], padding=True, return_tensors="pt")
)
theirs = getattr(theirs, "pooler_output", theirs)
assert (torch.nn.functional.normalize(theirs, dim=1) - ours).abs().max() < 1e-6
theirs = open_clip.create_model("local-dir:exported/open_clip").encode_text(
    tokenizer(["a cat", "two dogs"]), normalize=True
)
assert (theirs - ours).abs().max() < 1e-6
""",
    "The losses": """
expected = open_clip.ClipLoss()(image_features, text_features, logit_scale)
assert (loss - expected).abs() < 1e-5
assert clip_loss(image_features, text_features, logit_scale) == loss
""",
    "The loader": """
assert images.shape == (128, 3, 64, 64) and token_ids.shape == (128, 32)
assert (token_ids[:, 0] == 49406).all() and ((token_ids == 49407).sum(1) == 1).all()
""",
    "The tokenizer": """
assert (torch.from_numpy(token_ids) == open_clip.tokenize("a photo of a cat")).all()
assert offsets.tolist() == [0, 2, 4]
""",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, drawings):
    """A folder with the files that the page names."""
    place = tmp_path_factory.mktemp("page")
    scored_model.write_run(place / "runs" / "demo")
    (place / "pictures").mkdir()
    for number, images in enumerate(drawings.values()):
        (place / "pictures" / f"{number}.jpg").write_bytes(next(iter(images.values())))
    (place / "examples").symlink_to(ROOT / "examples")
    return place


def test_every_block_of_the_page_runs(place):
    script = [BEGIN.format(group=f"init_method='file://{place}/group', rank=0, world_size=1")]
    page = (ROOT / "docs" / "library.md").read_text()
    unchecked = dict(CHECKS)
    for section in page.split("\n## ")[1:]:
        title = section.partition("\n")[0]
        for block in re.findall(r"(?:^    .*\n|^\n)+", section, re.MULTILINE):
            code = textwrap.dedent(block).strip() + "\n"
            if code.startswith("laclip "):
                arguments = [line.split()[1:] for line in code.splitlines()]
                code = f"from laclip.cli import main\nassert not any(map(main, {arguments}))\n"
            script.append(code)
        (check,) = (name for name in CHECKS if title.startswith(name))
        script.append(unchecked.pop(check))
    assert not unchecked
    (place / "page.py").write_text("\n".join(script))
    done = subprocess.run(
        [sys.executable, ROOT / "requirements" / "oracles.py", "page.py"],
        cwd=place, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
