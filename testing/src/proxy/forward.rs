//! One call on its way.

use std::{io, sync::Arc};

use bytes::Bytes;
use futures_util::stream;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use tokio::sync::watch;

use super::{Answer, Call, Fault, Shared, Side, cut::Turn};

type Failure = Box<dyn std::error::Error + Send + Sync>;
type Body = UnsyncBoxBody<Bytes, Failure>;

/// What the body of an answer does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Tap {
    /// It flows.
    Open,
    /// Nothing arrives any more.
    Silent,
    /// These are its last bytes.
    End(Bytes),
}

/// Answers a call. An error ends the connection.
pub(super) async fn answer(
    shared: Arc<Shared>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Failure> {
    let call = Call {
        method: request.method().clone(),
        path: request.uri().path().to_owned(),
        query: request.uri().query().unwrap_or_default().to_owned(),
        answered: None,
    };
    let (number, fault, last) = {
        let mut state = shared.lock();
        state.calls.push(call.clone());
        let number = state.calls.len() - 1;
        let turn = state
            .cut
            .as_ref()
            .map(|(cut, which)| (cut.clone(), cut.turn(which(&call))));
        match turn {
            Some((cut, Turn::Last(side))) => (number, None, Some((cut, side))),
            Some((_, Turn::Stopped)) => (number, Some((Fault::Hang, watch::channel(()).1)), None),
            None | Some((_, Turn::Pass)) => {
                let fault = state.rules.iter().find_map(|rule| rule.hit(&call));
                (number, fault, None)
            }
        }
    };
    if let Some((cut, Side::Before)) = last {
        cut.stop().await;
    }
    let (fault, held) = fault.unzip();
    match &fault {
        Some(Fault::Answer(answer)) => {
            shared.lock().calls[number].answered = Some(answer.status);
            return Ok(given(answer));
        }
        Some(Fault::Late(late)) => tokio::time::sleep(*late).await,
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Held) => {
            if let Some(mut held) = held {
                // Nothing is ever sent: it fails when the fault ends.
                let _ = held.changed().await;
            }
        }
        Some(Fault::Lost | Fault::Silent) | None => {}
    }
    let (head, body) = shared.upstream.send(request).await?.into_parts();
    shared.lock().calls[number].answered = Some(head.status);
    if let Some((cut, Side::After)) = last {
        // By now it has been done, but only the whole answer says so.
        let _ = body.collect().await;
        cut.stop().await;
    }
    if let Some(Fault::Lost) = fault {
        let _ = body.collect().await;
        return Err(io::Error::from(io::ErrorKind::ConnectionReset).into());
    }
    let (tap, tapped) = watch::channel(match fault {
        Some(Fault::Silent) => Tap::Silent,
        _ => Tap::Open,
    });
    let mut state = shared.lock();
    state.streams.retain(|(_, tap)| !tap.is_closed());
    state.streams.push((call, tap));
    Ok(Response::from_parts(head, flow(body, tapped)))
}

fn given(answer: &Answer) -> Response<Body> {
    let body = Full::new(answer.body.clone());
    let mut response = Response::new(body.map_err(|never| match never {}).boxed_unsync());
    *response.status_mut() = answer.status;
    response
        .headers_mut()
        .extend(answer.headers.iter().cloned());
    response
}

/// The server's body, as far as the tap lets it.
fn flow(body: Incoming, tap: watch::Receiver<Tap>) -> Body {
    let frames = stream::unfold(Some((body, tap)), |open| async move {
        let (mut body, mut tap) = open?;
        let mut has_ended = false;
        loop {
            let now = tap.borrow_and_update().clone();
            if let Tap::End(last) = now {
                return Some((Ok(Frame::data(last)), None));
            }
            tokio::select! {
                biased;
                // The proxy has ended.
                changed = tap.changed() => if changed.is_err() { return None },
                frame = body.frame(), if !has_ended => match frame {
                    _ if now == Tap::Silent => has_ended = frame.is_none(),
                    Some(frame) => {
                        return Some((frame.map_err(Failure::from), Some((body, tap))));
                    }
                    None => return None,
                }
            }
        }
    });
    StreamBody::new(frames).boxed_unsync()
}
