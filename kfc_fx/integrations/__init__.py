"""What trainers of others need of kfc_fx, beside the two lines; each module needs its package."""
