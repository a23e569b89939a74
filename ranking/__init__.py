"""From about a thousand candidates to one value each: multi-task DLRM, calibration, value model, diversity."""
