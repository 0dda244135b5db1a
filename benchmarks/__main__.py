"""Every benchmark, one after another: python -m benchmarks [--quick] [NAME ...]

    reader      random batches ÷ the speed of memory, ÷ HF datasets
    cold        first epoch from cold pages ÷ plain page faults
    growth      memory and time to open, as the store grows
    writer      write throughput ÷ appending the same bytes
    dump        dump ÷ bare teacher, ÷ Trainer.predict
    train_step  student step ÷ plain fine-tuning, ÷ teacher in memory; memory
    exactness   offline against online loss and gradient
    inside_step       a step that learns hidden states and attentions ÷ plain with these outputs; memory
    inside_exactness  offline against online loss and gradient, of each loss of the inside
    language_codecs   bytes a token against KL, for each way of keeping logits
    language_step     a language model's step ÷ plain, online and dense; memory
    scale             plan, index and sampler of a million samples in 100,000 shards (only when named: ten minutes)
    results           students with and without distillation (only when named: an hour)
    language_results  the same of language models (only when named: half an hour)
    inside_results    students that learn what is inside a teacher, or its answers alone (only when named: an hour)
    reader_results    students that find answers, from labels, logits, what is inside, augmented rows (only when named)
    image_results     students of images, one view of each or ten (only when named: a quarter of an hour)
    segmentation_results  students that mark every pixel (only when named: a quarter of an hour)
    augment_results   students of few rows, augmented or not (only when named)
    tagger_speed      words a second and size of a tagger that reads words ÷ its teacher (only when named)
    tagger_results    taggers with and without distillation, with and without word vectors (only when named: hours)
    shared_store      two workers, a remote, another user, two ranks (only when named: half an hour)
    ensemble_results  students of three teachers, or of the best of them (only when named: an hour)

Teachers, stores and runs are kept in benchmarks/work, or where PREDISTILL_BENCH says (up to 30 GB); data
comes from PREDISTILL_DATA.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DEFAULT = (
    "reader", "cold", "growth", "writer", "exactness", "dump", "train_step", "inside_step", "inside_exactness",
    "language_codecs", "language_step",
)  # fmt: skip
NAMED = ("results", "language_results", "inside_results", "reader_results", "image_results", "augment_results",
         "segmentation_results", "ensemble_results", "tagger_speed", "tagger_results", "scale",
         "shared_store")  # fmt: skip


def main() -> None:
    names = [word for word in sys.argv[1:] if not word.startswith("-")]
    flags = [word for word in sys.argv[1:] if word.startswith("-")]
    if flags not in ([], ["--quick"]) or not set(names) <= {*DEFAULT, *NAMED}:
        sys.exit(__doc__)
    for name in names or DEFAULT:
        print(f"### {name}\n", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).with_name(f"{name}.py")), *flags], check=True)


if __name__ == "__main__":
    main()
