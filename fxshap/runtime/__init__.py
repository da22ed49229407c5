"""What runs at an explanation: captures, reference tapes, sample passes, coalitions and locks."""
