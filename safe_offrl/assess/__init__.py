"""What a log shows of a policy before its first step."""
