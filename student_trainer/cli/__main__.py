"""`python -m student_trainer.cli` is `student-trainer`."""

from student_trainer.cli.main import main

main()
