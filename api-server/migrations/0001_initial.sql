-- Times are microseconds since the Unix epoch. The columns of sessions and projects bear the names
-- of the wire contract, so that `search` and `orderBy` name columns.

CREATE TABLE sessions (
    id TEXT PRIMARY KEY NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    name TEXT NOT NULL,
    repo_url TEXT,
    prompt TEXT,
    created_by_user_id TEXT,
    assigned_user_id TEXT,
    workflow_id TEXT,
    repos TEXT,
    timeout INTEGER,
    llm_model TEXT,
    llm_temperature REAL,
    llm_max_tokens INTEGER,
    parent_session_id TEXT,
    bot_account_name TEXT,
    resource_overrides TEXT,
    environment_variables TEXT,
    labels TEXT,
    annotations TEXT,
    project_id TEXT,
    phase TEXT,
    start_time INTEGER,
    completion_time INTEGER,
    sdk_session_id TEXT,
    sdk_restart_count INTEGER,
    conditions TEXT,
    reconciled_repos TEXT,
    reconciled_workflow TEXT,
    kube_cr_name TEXT,
    kube_cr_uid TEXT,
    kube_namespace TEXT,
    agent_id TEXT
) STRICT;

CREATE INDEX sessions_by_phase ON sessions (phase);
CREATE INDEX sessions_by_project ON sessions (project_id);
CREATE INDEX sessions_by_creator ON sessions (created_by_user_id);

-- AUTOINCREMENT: a number is never given twice, even after its message was deleted.
CREATE TABLE messages (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL,
    session_id TEXT NOT NULL,
    message_id TEXT,
    event_type TEXT NOT NULL,
    payload TEXT NOT NULL,
    created_at INTEGER NOT NULL
) STRICT;

CREATE INDEX messages_by_session ON messages (session_id, seq);
CREATE UNIQUE INDEX messages_once ON messages (session_id, message_id)
    WHERE message_id IS NOT NULL;

-- created_by is not on the wire: it says who may change the project.
CREATE TABLE projects (
    id TEXT PRIMARY KEY NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    name TEXT NOT NULL,
    display_name TEXT,
    description TEXT,
    labels TEXT,
    annotations TEXT,
    status TEXT,
    created_by TEXT
) STRICT;

CREATE TABLE project_settings (
    id TEXT PRIMARY KEY NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    project_id TEXT NOT NULL UNIQUE,
    group_access TEXT,
    repositories TEXT
) STRICT;
