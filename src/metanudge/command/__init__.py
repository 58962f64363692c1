"""What the command ``metanudge`` makes of names and settings files: learners, trainings of all seeds, test scores."""
