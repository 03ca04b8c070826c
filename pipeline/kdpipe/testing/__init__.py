"""Contract suites: what every implementation of a protocol owes, as classes of tests that pytest runs on yours."""

import pytest

# Otherwise an assertion of theirs that fails shows no values.
pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in ("sources", "tasks", "teachers")))

from kdpipe.testing.sources import SourceContract  # noqa: E402
from kdpipe.testing.tasks import TaskContract  # noqa: E402
from kdpipe.testing.teachers import LearnerContract, TeacherContract  # noqa: E402

__all__ = ["LearnerContract", "SourceContract", "TaskContract", "TeacherContract"]
