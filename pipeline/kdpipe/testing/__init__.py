"""Contract suites: what every implementation of a protocol owes, as classes of tests that pytest runs on yours."""

from kdpipe.testing.sources import SourceContract
from kdpipe.testing.tasks import TaskContract
from kdpipe.testing.teachers import LearnerContract, TeacherContract

__all__ = ["LearnerContract", "SourceContract", "TaskContract", "TeacherContract"]
