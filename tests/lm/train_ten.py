"""`python -m tests.lm.train_ten OUTPUT [resume]`: ten steps that use every kind of memory a run has."""

import sys

import kullback as kb
from tests.lm.small import ROWS, build_tokenizer, random_model

if __name__ == "__main__":
    kb.train(
        "on_policy_distillation",
        student=random_model(1),
        teacher=random_model(2, hidden=24),
        tokenizer=build_tokenizer(),
        data=ROWS,
        output=sys.argv[1],
        resume="resume" in sys.argv,
        student_fraction=0.5,
        otherwise="teacher",
        max_completion=12,
        schedule={"signal.temperature": "linear(2 -> 1, steps=8)"},
        steps=10,
        prompts_per_step=8,
        micro_batches=2,
        learning_rate=1e-2,
        lr_schedule="cosine",
        save_every=5,
        evaluate={"problems": 0},
    )
