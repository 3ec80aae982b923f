"""What a training run will take and reach, before its first step."""
