"""A plain SFT run that logs how far its student is from a teacher: python kl_callback.py STUDENT ROWS.jsonl HOST:PORT OUTPUT"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from student_trainer.api import connect, gkd_loss

student, rows_file, address, output = sys.argv[1:5]
tokenizer = AutoTokenizer.from_pretrained(student)


class KlToTeacher(TrainerCallback):
    """Logs KL(teacher | student) in nats per token on one batch, as often as the trainer logs."""

    def __init__(self, trainer, batch):
        self.trainer, self.ids = trainer, batch["input_ids"]
        self.labels = teacher.labels(batch["input_ids"], batch["labels"] != -100)  # asked once

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % args.logging_steps == 0:
            with torch.no_grad():
                logits = model(self.ids.to(model.device)).logits
            self.trainer.log({"kl_to_teacher": gkd_loss(logits, self.labels).kd.item()})


config = SFTConfig(output, max_steps=4, logging_steps=2, bf16=False, report_to="none", save_strategy="no")
model = AutoModelForCausalLM.from_pretrained(student, dtype="float32")
rows = load_dataset("json", data_files=rows_file, split="train")  # columns prompt and completion
with connect(address, tokenizer=tokenizer) as teacher:
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    trainer.add_callback(KlToTeacher(trainer, next(iter(trainer.get_train_dataloader()))))
    trainer.train()
