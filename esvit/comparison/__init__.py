"""Many runs side by side: what differs in their options, what they reached, and the pictures and tables of it. Imports no torch."""
