"""Who does what when: schedules, instruction lists, their compiler and their checker."""
