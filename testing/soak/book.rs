//! All sessions as the API server has them, looked up again and again.

use std::{collections::HashMap, sync::Arc, time::Duration};

use ambient_testing::operator::Operator;
use reqwest::{Method, StatusCode};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// Time between two looks.
const PAUSE: Duration = Duration::from_millis(500);

/// Phase of each session by its id, as last seen. Clones share it.
#[derive(Clone)]
pub struct Book(watch::Receiver<Arc<HashMap<String, String>>>);

impl Book {
    /// Looks until `quit`.
    pub fn open(operator: Operator, quit: CancellationToken, tasks: &mut JoinSet<()>) -> Self {
        let (phases, book) = watch::channel(Arc::default());
        tasks.spawn(async move {
            let looking = async {
                loop {
                    if let Some(seen) = look(&operator).await {
                        phases.send_replace(Arc::new(seen));
                    }
                    sleep(PAUSE).await;
                }
            };
            quit.run_until_cancelled(looking).await;
        });
        Self(book)
    }

    /// A session's phase; none when it is not there.
    pub fn phase(&self, id: &str) -> Option<String> {
        self.0.borrow().get(id).cloned()
    }

    /// Waits until a session is as wanted; gives what it was last when that takes too long.
    pub async fn until(
        &self,
        id: &str,
        limit: Duration,
        wanted: impl Fn(Option<&str>) -> bool,
    ) -> Result<(), Option<String>> {
        let mut book = self.0.clone();
        let seen = book.wait_for(|phases| wanted(phases.get(id).map(String::as_str)));
        match timeout(limit, seen).await {
            Ok(_) => Ok(()),
            Err(_) => Err(self.phase(id)),
        }
    }
}

/// All pages; none when there is no answer.
async fn look(operator: &Operator) -> Option<HashMap<String, String>> {
    let mut all = HashMap::new();
    for page in 1.. {
        let path = format!("/sessions?size=1000&orderBy=id&page={page}");
        let answer = operator.try_request(Method::GET, &path, None).await;
        let (StatusCode::OK, list) = answer.ok()? else {
            return None;
        };
        let items = list["items"].as_array()?;
        for session in items {
            let phase = session["phase"].as_str().unwrap_or_default();
            all.insert(session["id"].as_str()?.to_owned(), phase.to_owned());
        }
        if items.len() < 1000 {
            break;
        }
    }
    Some(all)
}
