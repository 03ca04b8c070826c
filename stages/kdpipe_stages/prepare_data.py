"""`kdpipe prepare-data`: source -> data/prepared/ (inputs, labels, splits)."""

from __future__ import annotations

from kdpipe import durable
from kdpipe.data.preparing import Prepared, RowSchema, prepare
from kdpipe.data.sources import Source
from kdpipe.fingerprint import canonical_json
from kdpipe_stages.params import prepared_sections, source_columns, split_plan
from kdpipe_stages.project import Project


def run(project: Project) -> Prepared:
    """Bring the prepared rows up to date with the source; rows that are known already are not written again."""
    section = project.params.data
    source: Source = project.bind(section.source, "data.source", path=project.root / section.path).make()
    task = project.task()
    with project.only_writer("prepared", f"preparing {project.prepared}"):
        prepared = prepare(
            source,
            RowSchema(to_inputs=task.to_inputs, to_labels=task.to_labels),
            source_columns(section.columns),
            split_plan(section.splits),
            project.prepared,
        )
        durable.write_text(project.prepared_settings, canonical_json(prepared_sections(project.params)) + "\n")
    return prepared
