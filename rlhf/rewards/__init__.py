"""Scores of responses: functions in processes of their own, reward models, their weighted sum. Light: the scoring processes come through here."""
