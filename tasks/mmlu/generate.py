"""Writes the YAML files of mmlu_5shot and mmlu_0shot beside itself: python tasks/mmlu/generate.py.

Categories as in hendrycks/test.
"""

from pathlib import Path

CATEGORIES = {
    "stem": "abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics "
    "college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics "
    "high_school_physics high_school_statistics machine_learning",
    "humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
    "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
    "professional_law world_religions",
    "social_sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy",
    "other": "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management "
    "marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology",
}
GROUP = """group: {name}
task:
{tasks}
aggregate_metric_list:
  - metric: acc
    aggregation: mean
    weight_by_size: true
metadata:
  version: 2.0
"""
SUBJECT = """include: ../_template
task: mmlu_{shots}shot_{subject}
task_alias: {subject}
num_fewshot: {shots}
dataset_kwargs:
  subject: {subject}
"""


def main() -> None:
    """Write both folders."""
    for shots in (5, 0):
        folder = Path(__file__).parent / f"{shots}shot"
        folder.mkdir(exist_ok=True)
        name = f"mmlu_{shots}shot"
        categories = [f"  - {name}_{category}" for category in CATEGORIES]
        (folder / f"_{name}.yaml").write_text(GROUP.format(name=name, tasks="\n".join(categories)))
        for category, listed in CATEGORIES.items():
            subjects = [f"  - {name}_{subject}" for subject in listed.split()]
            group = GROUP.format(name=f"{name}_{category}", tasks="\n".join(subjects))
            (folder / f"_{name}_{category}.yaml").write_text(group)
            for subject in listed.split():
                (folder / f"{subject}.yaml").write_text(SUBJECT.format(shots=shots, subject=subject))


if __name__ == "__main__":
    main()
