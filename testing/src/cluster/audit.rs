//! What the API server wrote down of the requests it got.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{BufReader, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// What is written down: who asked for what and how it was answered, no bodies. Not what the
/// cluster's own programs ask, nor questions after its health.
pub(super) const POLICY: &str = "\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: None
  users: ['system:apiserver', 'system:kube-controller-manager', 'system:kube-scheduler']
- level: None
  userGroups: ['system:serviceaccounts:kube-system']
- level: None
  nonResourceURLs: ['/readyz*', '/livez*', '/healthz*']
- level: Metadata
";

/// One request to the API server. What does not apply is empty.
///
/// The audit log has no content types, so it does not tell one kind of patch from another; the
/// query in `uri` has a field manager and whether an apply was forced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Who asked, such as `admin`.
    pub user: String,
    /// As RBAC names it, such as `get`, `list`, `watch`, `create`, `patch`, `deletecollection`.
    pub verb: String,
    /// API group; empty for that of pods and Secrets.
    pub group: String,
    /// Such as `pods`; empty for requests that are about no resource, such as for `/version`.
    pub resource: String,
    /// Such as `status`.
    pub subresource: String,
    /// Namespace of the object, or of the list.
    pub namespace: String,
    /// Name of the object; empty for lists.
    pub name: String,
    /// Status of the answer, such as 201; 0 when there was none.
    pub code: u16,
    /// The client's `User-Agent`.
    pub user_agent: String,
    /// Path and query.
    pub uri: String,
    /// When it was answered (RFC 3339); a watch, when it ended.
    pub at: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Event {
    #[serde(rename = "auditID")]
    audit_id: String,
    #[serde(default)]
    verb: String,
    #[serde(rename = "requestURI", default)]
    request_uri: String,
    #[serde(default)]
    user_agent: String,
    user: Who,
    impersonated_user: Option<Who>,
    object_ref: Option<Object>,
    response_status: Option<Status>,
    #[serde(default)]
    stage_timestamp: String,
}

#[derive(Deserialize)]
struct Who {
    #[serde(default)]
    username: String,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Object {
    resource: String,
    subresource: String,
    namespace: String,
    name: String,
    api_group: String,
}

#[derive(Deserialize)]
struct Status {
    #[serde(default)]
    code: u16,
}

/// All requests in the log so far, each once: a watch is written down when it was answered, and
/// again when it ended.
pub(super) fn read(folder: &Path) -> Vec<Request> {
    let log = fs::read(folder.join("audit.log")).unwrap_or_default();
    parse(&String::from_utf8_lossy(&log))
}

/// Reads the log piece by piece, each request once; a watch that ends after it was read comes again.
#[derive(Debug)]
pub struct NewRequests {
    path: PathBuf,
    offset: u64,
}

impl NewRequests {
    /// Begins at the log's end.
    pub(super) fn open(folder: &Path) -> Self {
        let path = folder.join("audit.log");
        let offset = fs::metadata(&path).map_or(0, |it| it.len());
        Self { path, offset }
    }

    /// What was written down since the last call.
    pub fn read(&mut self) -> Vec<Request> {
        let mut text = Vec::new();
        let read = File::open(&self.path).and_then(|file| {
            let mut file = BufReader::new(file);
            file.seek(SeekFrom::Start(self.offset))?;
            file.read_to_end(&mut text)
        });
        if read.is_err() {
            return Vec::new();
        }
        // The last line may be half written.
        let whole = text
            .iter()
            .rposition(|it| *it == b'\n')
            .map_or(0, |it| it + 1);
        self.offset += whole as u64;
        parse(&String::from_utf8_lossy(&text[..whole]))
    }
}

fn parse(log: &str) -> Vec<Request> {
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut requests: Vec<Request> = Vec::new();
    // The last line may be half written.
    for event in log
        .lines()
        .filter_map(|line| serde_json::from_str::<Event>(line).ok())
    {
        let id = event.audit_id.clone();
        let request = Request::from(event);
        if let Some(&place) = places.get(&id) {
            requests[place] = request;
        } else {
            places.insert(id, requests.len());
            requests.push(request);
        }
    }
    requests
}

impl From<Event> for Request {
    fn from(event: Event) -> Self {
        let object = event.object_ref.unwrap_or_default();
        Self {
            user: event.impersonated_user.unwrap_or(event.user).username,
            verb: event.verb,
            group: object.api_group,
            resource: object.resource,
            subresource: object.subresource,
            namespace: object.namespace,
            name: object.name,
            code: event.response_status.map_or(0, |it| it.code),
            user_agent: event.user_agent,
            uri: event.request_uri,
            at: event.stage_timestamp,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_piece_by_piece_is_read_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.log");
        let line = |id: &str| {
            format!(r#"{{"auditID":"{id}","verb":"{id}","user":{{"username":"admin"}}}}"#) + "\n"
        };
        fs::write(&path, line("before")).unwrap();
        let mut new = NewRequests::open(folder.path());
        let mut verbs = |text: &str| {
            let mut log = fs::read_to_string(&path).unwrap();
            log.push_str(text);
            fs::write(&path, log).unwrap();
            let read = new.read().into_iter().map(|it| it.verb);
            read.collect::<Vec<_>>()
        };

        let third = line("third");
        let (half, rest) = third.split_at(20);
        assert_eq!(
            verbs(&(line("first") + &line("second") + half)),
            ["first", "second"]
        );
        assert_eq!(verbs(""), [""; 0]);
        assert_eq!(verbs(rest), ["third"]);
    }

    #[test]
    fn a_watch_counts_once_and_half_a_line_not_at_all() {
        let line = |id: &str, verb: &str, stage: &str| {
            format!(
                r#"{{"auditID":"{id}","stage":"{stage}","requestURI":"/api/v1/pods","verb":"{verb}","user":{{"username":"admin"}},"objectRef":{{"resource":"pods","apiVersion":"v1"}},"responseStatus":{{"metadata":{{}},"code":200}}}}"#
            )
        };
        let log = [
            line("a", "watch", "ResponseStarted"),
            line("b", "list", "ResponseComplete"),
            line("a", "watch", "ResponseComplete"),
            r#"{"auditID":"c","verb":"ge"#.to_owned(),
        ]
        .join("\n");

        let requests = parse(&log);

        let verbs: Vec<_> = requests.iter().map(|it| it.verb.as_str()).collect();
        assert_eq!(verbs, ["watch", "list"]);
        assert_eq!(requests[0].resource, "pods");
        assert_eq!(requests[0].code, 200);
    }
}
