"""In every training stack that is installed: ranks share no image, epochs differ, resumes go on, labels are right."""

import pytest
from stacks import STACKS, find_version, measure

pytestmark = pytest.mark.train


@pytest.mark.parametrize("name", STACKS)
def test_in_each_stack_the_mix_does_what_the_readme_promises(name):
    stack = STACKS[name]
    if find_version(name) is None:
        pytest.skip(f"{stack.name}: {stack.package} is not installed")
    row = measure(name)
    assert row.disjoint is (True if stack.ranks > 1 else None)
    assert row.epochs is (None if name == "ultralytics" else True)
    assert row.resume == dict.fromkeys(stack.resumes, True)
    assert row.right == row.total > row.grafted > 0
